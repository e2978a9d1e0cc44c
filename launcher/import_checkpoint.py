"""`ftlaunch import-checkpoint SOURCE --to PLACE`: what another program saved as one of our checkpoints, streamed tensor
by tensor. Nothing but a few blocks of tensors is ever held."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..distributed.checkpoint.fragments import FragmentReader, TensorSpec
from ..distributed.checkpoint.layout import DTYPE_OF_TORCH, plan_files
from ..distributed.checkpoint.manifest import STATE_PATH, Manifest
from ..distributed.checkpoint.save import path_of
from ..distributed.importing.base import MOMENTS, Foreign
from ..distributed.importing.model import Aligned, Model, align, find_base
from ..distributed.importing.table import open_foreign
from ..distributed.merging import in_dtype, row_ranges
from ..distributed.model_files import ModelFolder
from ..distributed.reopen import precise_buffers
from ..recipes.errors import UserError
from . import units
from .export import as_json, with_changes
from .export_target import IMPORT, Part, Target, read_back, write_all

SHARD_BYTES = 2 * 2**30
"""Of a file of weights: what a broken-off import has to write again at most."""


@dataclass(frozen=True)
class Wanted:
    """What the user asked for. `base`: whose config.json and tokenizer; None: those beside the checkpoint. `dtype`:
    torch's name; None: the one that the model computed in. `training`: the optimizer's state too."""

    base: str | None
    dtype: str | None
    training: bool
    overwrite: bool


@dataclass(frozen=True)
class Blocks:
    """A `TensorStream` of a reader's tensors; all but those named in `kept` are cast to `dtype` when written."""

    reader: FragmentReader
    dtype: str | None
    kept: frozenset[str] = frozenset()

    def specs(self) -> Sequence[TensorSpec]:
        """In the dtype that they get."""
        return in_dtype([self.reader.spec(name) for name in self.reader.names()], self.dtype, self.kept)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """As they are stored there."""
        spec = self.reader.spec(name)
        width = torch.Size(spec.shape[1:]).numel()
        for start, stop in row_ranges(spec):
            yield self.reader.read(name, ((start * width, stop * width),))


@dataclass(frozen=True)
class Plan:
    """What is made of a checkpoint."""

    foreign: Foreign
    aligned: Aligned
    base: ModelFolder
    wanted: Wanted

    @cached_property
    def dtype(self) -> str | None:
        """safetensors' name of that of the weights; None: as they are stored."""
        name = self.wanted.dtype or self.foreign.dtype
        return DTYPE_OF_TORCH[name] if name else None

    @cached_property
    def kept(self) -> frozenset[str]:
        """Names of buffers that stay in fp32."""
        return precise_buffers(self.base) if self.dtype else frozenset()

    @cached_property
    def master(self) -> FragmentReader | None:
        """fp32 weights that say more than the published ones."""
        weights = self.aligned.weights
        wide = [name for name in weights.names() if weights.spec(name).dtype == "F32"]
        if not wide or self.dtype in (None, "F32"):
            return None
        return replace(weights, names_there={name: weights.names_there[name] for name in wide})

    @cached_property
    def parts(self) -> list[Part]:
        """In the order in which they are written."""
        tensors = {"model": Blocks(self.aligned.weights, self.dtype, self.kept)}
        if self.wanted.training:
            tensors |= {"master": Blocks(self.master, None)} if self.master is not None else {}
            tensors |= {moment: Blocks(self.aligned.moments[moment], "F32") for moment in MOMENTS}
        return [
            Part(stem, blocks, plan_files(blocks.specs(), stem=stem, max_file_bytes=SHARD_BYTES))
            for stem, blocks in tensors.items()
        ]

    def small_files(self) -> dict[str, bytes]:
        """All but the tensors, by path."""
        small = self.base.small_files()
        places = self.parts[0].files.places
        kinds = sorted({tensor.spec.dtype for name, (_, tensor) in places.items() if name not in self.kept})
        torch_names = {stored: name for name, stored in DTYPE_OF_TORCH.items()}
        if len(kinds) == 1:
            small["config.json"] = as_json(with_changes(self.base.config, {"dtype": torch_names[kinds[0]]}))
        for stem, _, files in self.parts:
            if (index := files.index()) is not None:
                small[path_of(stem, files.index_name)] = index
        if self.wanted.training and self.foreign.moments is not None:
            state = {"format": 1, "imported": self.foreign.what, "optimizer": {"step": self.foreign.moments.step}}
            small[STATE_PATH] = json.dumps(state, ensure_ascii=False).encode() + b"\n"
        return small

    def left_behind(self) -> list[str]:
        """What the checkpoint holds and the import does not, in words."""
        optimizer = [] if self.wanted.training else list(self._optimizer())
        beside = [f"tensors beside the model ({', '.join(self.aligned.beside[:3])})"] if self.aligned.beside else []
        return [*optimizer, *beside, *self.foreign.left_behind]

    def _optimizer(self) -> Iterator[str]:
        if self.master is not None:
            yield "fp32 weights (--training keeps them)"
        if self.foreign.moments is not None:
            yield f"AdamW's moments after {self.foreign.moments.step:g} updates (--training keeps them)"
        elif self.foreign.why_no_moments:
            yield f"the optimizer's state, if any: {self.foreign.why_no_moments}"

    def identity(self, source: str) -> dict[str, Any]:
        """What makes two imports the same: the very files, and what is made of them."""
        folder = Path(source.removeprefix("file://"))
        files = [(str(path.relative_to(folder)), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
        seen = [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in files]
        made = [f"{spec.name} {spec.shape} {spec.dtype}" for part in self.parts for spec in part.tensors.specs()]
        digest = zlib.crc32("\n".join(seen + made).encode())
        return {"from": self.foreign.what, "base": self.base.url, "digest": digest, "step": self.foreign.step}


def import_checkpoint(source: str, to: str, wanted: Wanted) -> int:
    """Write it, read it back in samples, and say what it is and what was left behind. Raises UserError for what is no
    checkpoint, one that is damaged or of another model, and a target that is in use."""
    plan = _plan(source, wanted)
    small = plan.small_files()
    planned = sorted((*small, *(path_of(part.stem, file.name) for part in plan.parts for file in part.files.files)))
    target = Target.begin(to, plan.identity(source), planned, overwrite=wanted.overwrite, kind=IMPORT)
    records = write_all(target, plan.parts, small)
    manifest = Manifest(plan.foreign.step, 0, tuple(records))
    target.finish(manifest)
    read_back(to, manifest)
    print("\n".join(_said(plan, to, sum(record.size for record in records))))
    return 0


def _plan(source: str, wanted: Wanted) -> Plan:
    foreign = open_foreign(source)
    if wanted.training and foreign.moments is None:
        raise UserError(
            f"--training: the optimizer's state of the {foreign.what} cannot be kept: {foreign.why_no_moments}. Leave "
            "--training out to import the weights alone."
        )
    base = find_base(source, wanted.base)
    return Plan(foreign, align(foreign, Model.of(base)), base, wanted)


def _said(plan: Plan, to: str, total: int) -> Iterator[str]:
    yield f"{plan.foreign.what}: {units.size(total)} in {to}, read back in samples"
    if plan.aligned.prefix:
        yield f"  names: {plan.aligned.prefix!r} before them was left out"
    if plan.wanted.training:
        yield "  model.keep_optimizer_state: true goes on with its fp32 weights and moments"
    for what in plan.left_behind():
        yield f"  left behind: {what}"
    yield f"  model.path: {to} starts from it; from_pretrained({to!r}) opens it; ftlaunch verify {to} reads all of it"
