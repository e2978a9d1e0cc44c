"""Weights as a stream of blocks of rows: as they are stored, or with an adapter merged into them.

No model is ever held: W + scale * B A is computed for some rows at a time, in fp32 (LoRA, Hu et al. 2021, section 4.1;
rsLoRA differs in the scale), and so is DoRA's magnitude times direction (Liu et al. 2024, equation 5), whose lengths
are those of rows. An adapter's own A and B are small and held for one tensor. Only weights that are stored transposed
(GPT-2's) are merged whole, one at a time.

Shapes: a weight W [rows, columns]; `up` [rows, rank] and `down` [rank, columns] make its update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..recipes.errors import UserError
from .checkpoint.fragments import TensorSpec
from .checkpoint.layout import DTYPES, num_bytes, num_elements
from .checkpoint.manifest import DamagedError
from .checkpoint.reader import CheckpointReader
from .model_files import ModelFolder

BLOCK_BYTES = 16 * 2**20
"""Stored bytes of a tensor that are in the making at once; in fp32 they and what is computed take a few times that."""

PREFIX = "base_model.model."
"""What peft puts before the names of the model's own modules."""

FLOATS = frozenset({"F64", "F32", "BF16", "F16"})


class TensorStream(Protocol):
    """Tensors that come in blocks."""

    def specs(self) -> Sequence[TensorSpec]:
        """What there is, in a fixed order."""
        ...

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The elements of a tensor, flat, block by block from its beginning; perhaps in a wider dtype."""
        ...


def row_ranges(spec: TensorSpec, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges of rows (of elements, where there are no rows) of at most `block_bytes`, or of one row."""
    rows = spec.shape[0] if spec.shape else 1
    if not num_elements(spec):
        return
    step = max(1, block_bytes * rows // num_bytes(spec))
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def read_rows(reader: CheckpointReader, name: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a stored tensor. Raises DamagedError."""
    spec = reader.spec(name)
    width = math.prod(spec.shape[1:])
    values = reader.read(name, ((start * width, stop * width),))
    if reader.damaged:
        raise DamagedError(reader.damaged[0])
    return values.view(stop - start, *spec.shape[1:])


def read_whole(reader: CheckpointReader, name: str) -> Tensor:
    """A small tensor, in fp32. Raises DamagedError."""
    spec = reader.spec(name)
    return read_rows(reader, name, 0, spec.shape[0] if spec.shape else 1).view(spec.shape).float()


@dataclass(frozen=True)
class StoredTensors:
    """A folder's weights as they are."""

    reader: CheckpointReader

    def specs(self) -> Sequence[TensorSpec]:
        """What the folder holds."""
        return [self.reader.spec(name) for name in self.reader.names()]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """In the stored dtype."""
        for start, stop in row_ranges(self.reader.spec(name)):
            yield read_rows(self.reader, name, start, stop).flatten()


class Structure(NamedTuple):
    """What the tensors of a model do not say. `transposed`: modules that hold [inputs, outputs]; `tied`: the head's
    weight -> that of the embeddings, where they are one."""

    transposed: frozenset[str]
    tied: Mapping[str, str]


def structure_of(folder: ModelFolder) -> Structure:
    """From config.json, on the meta device. Raises UserError for a model that transformers cannot build."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(folder.local_small_files)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError, KeyError) as error:
        raise UserError(f"{folder.url}: transformers cannot build this model: {error}") from error
    names = {id(module): name for name, module in model.named_modules()}
    transposed = frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not config.get_text_config().tie_word_embeddings:
        return Structure(transposed, {})
    return Structure(transposed, {f"{names[id(head)]}.weight": f"{names[id(embeddings)]}.weight"})


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight; with `magnitude` [rows] (DoRA) the sum's rows are then brought to these
    lengths. `transposed`: the weight is stored as [columns, rows]."""

    up: Tensor
    down: Tensor
    scale: float
    magnitude: Tensor | None
    transposed: bool

    def merged(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the sum, in fp32."""
        total = weight.float() + (self.up[start:stop] @ self.down) * self.scale
        if self.magnitude is not None:
            total *= (self.magnitude[start:stop] / torch.linalg.norm(total, dim=1)).unsqueeze(1)
        return total

    @property
    def shape(self) -> tuple[int, int]:
        """That of the stored weight."""
        rows, columns = self.up.shape[0], self.down.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


def scale_of(config: Mapping[str, Any]) -> float:
    """By what B A is multiplied. Raises UserError for an adapter that is more than the LoRA that ftlaunch trains."""
    unknown = [key for key in ("rank_pattern", "alpha_pattern", "lora_bias", "target_parameters") if config.get(key)]
    if config.get("peft_type") != "LORA" or unknown:
        what = ", ".join(unknown) or f"peft_type {config.get('peft_type')}"
        raise UserError(f"an adapter with {what} cannot be merged here: use peft's own merge_and_unload")
    rank = config["r"]
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


class MergedTensors:
    """The base's tensors with an adapter merged in: under the base's names, in the base's order.

    A head that was tied to embeddings that the adapter changes keeps the old values, and is a tensor of its own then
    (`untied`). Raises UserError for an adapter that does not fit this base.
    """

    def __init__(
        self, base: CheckpointReader, adapter: CheckpointReader, config: Mapping[str, Any], structure: Structure
    ) -> None:
        self._base, self._adapter, self._structure = base, adapter, structure
        self._scale = scale_of(config)
        self._updated: dict[str, dict[str, str]] = {}
        self._replaced: dict[str, str] = {}
        for name in adapter.names():
            self._sort_in(name)
        changed = self._updated.keys() | self._replaced.keys()
        self.untied = {
            head: table for head, table in structure.tied.items() if table in changed and head not in changed
        }
        self._check()

    def _sort_in(self, name: str) -> None:
        """Either one of the tensors that make a weight's update, or a tensor that was trained whole."""
        module, inside, kind = name.removeprefix(PREFIX).partition(".lora_")
        if inside:
            # An embedding's parts are parameters, not modules, and may carry the adapter's own name.
            part = kind.removesuffix(".weight").removesuffix(".default")
            self._updated.setdefault(f"{module}.weight", {})[part] = name
        else:
            self._replaced[module] = name

    def _check(self) -> None:
        there = set(self._base.names())
        if lost := sorted(name for name in (*self._updated, *self._replaced) if name not in there):
            raise UserError(
                f"{self._adapter.url} changes {', '.join(lost[:3])}, which {self._base.url} does not hold: it is an "
                "adapter of another model"
            )

    def specs(self) -> Sequence[TensorSpec]:
        """The base's, and heads that are no longer tied."""
        stored = [self._base.spec(name) for name in self._base.names() if name not in self.untied]
        return stored + [replace(self._base.spec(table), name=head) for head, table in self.untied.items()]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """What is merged comes in fp32, the rest as it is stored."""
        if name in self._replaced:
            yield from self._replacement(name)
        elif name in self._updated:
            yield from self._merged(name)
        else:
            yield from StoredTensors(self._base).blocks(self.untied.get(name, name))

    def _replacement(self, name: str) -> Iterator[Tensor]:
        trained = self._replaced[name]
        self._must_fit(name, self._adapter.spec(trained).shape)
        yield from StoredTensors(self._adapter).blocks(trained)

    def _merged(self, name: str) -> Iterator[Tensor]:
        update, spec = self._update(name), self._base.spec(name)
        self._must_fit(name, update.shape)
        if update.transposed:  # its rows lie across the stored ones
            weight = read_rows(self._base, name, 0, spec.shape[0])
            yield update.merged(weight.T, 0, spec.shape[1]).T.flatten()
            return
        for start, stop in row_ranges(spec):
            yield update.merged(read_rows(self._base, name, start, stop), start, stop).flatten()

    def _update(self, name: str) -> Update:
        parts = {kind: read_whole(self._adapter, stored) for kind, stored in self._updated[name].items()}
        magnitude = parts.pop("magnitude_vector", None)
        transposed = name.removesuffix(".weight") in self._structure.transposed
        if parts.keys() == {"A", "B"}:
            return Update(parts["B"], parts["A"], self._scale, magnitude, transposed)
        if parts.keys() == {"embedding_A", "embedding_B"} and magnitude is None:
            return Update(parts["embedding_A"].T, parts["embedding_B"].T, self._scale, None, transposed=False)
        raise UserError(
            f"{self._adapter.url}: the update of {name} has the parts {', '.join(self._updated[name])}, which is no "
            "LoRA that can be merged here"
        )

    def _must_fit(self, name: str, shape: tuple[int, ...]) -> None:
        held = self._base.spec(name).shape
        if held != shape:
            raise UserError(
                f"{name} is {held} in {self._base.url} and {shape} in {self._adapter.url}: it is an adapter of another "
                "model"
            )


def in_dtype(specs: Sequence[TensorSpec], dtype: str | None, kept: Set[str] = frozenset()) -> list[TensorSpec]:
    """Floating-point tensors in another dtype (safetensors' name), the others and those named in `kept` as they are;
    None: all as they are."""

    def wanted(spec: TensorSpec) -> str:
        return dtype if dtype and spec.dtype in FLOATS and spec.name not in kept else spec.dtype

    return [replace(spec, dtype=wanted(spec)) for spec in specs]


def cast(block: Tensor, spec: TensorSpec) -> Tensor:
    """A block in the dtype that it is stored in. Raises UserError for finite numbers that this dtype cannot hold."""
    target = getattr(torch, DTYPES[spec.dtype].torch_name)
    if block.dtype == target:
        return block
    result = block.to(target)
    if target.is_floating_point and not torch.equal(result.isfinite(), block.isfinite()):
        largest, name = block[block.isfinite()].float().abs().max(), str(target).removeprefix("torch.")
        raise UserError(f"{spec.name} has values up to {largest:.3g}, more than {name} holds: take another --dtype")
    return result
