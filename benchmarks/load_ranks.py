"""The ranks of benchmarks/checkpoint_load.py: they write one state in three formats, and fill engines from them."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed  # noqa: F401  takes long: once, before the ranks are forked
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers.models.llama.modeling_llama  # noqa: F401  the same
from save_ranks import resident_bytes
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from ftlaunch.distributed.checkpoint.content import Content
from ftlaunch.distributed.checkpoint.fragments import TensorSpec
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.save import CheckpointWriter
from ftlaunch.distributed.initialise import drawn_from, keyed_seed
from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import ModelFolder
from ftlaunch.distributed.saver import load_parts, parts_of
from ftlaunch.distributed.strategies.table import prepare
from ftlaunch.distributed.world import World
from ftlaunch.recipes.schema import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = 7
ZERO3 = {"type": "deepspeed", "stage": 3}


class Turn(NamedTuple):
    """What one rank saw: seconds; bytes that it asked the system for; its peak of resident memory, and how far that was
    above what it held in the end [bytes]; a number that tells whether the right values came."""

    seconds: float
    read_bytes: int
    peak_bytes: int
    extra_bytes: int
    digest: float


@dataclass
class Ranks:
    """What one rank knows: `model` is a folder with config.json, `place` where the three formats lie."""

    rank: int
    size: int
    model: str
    place: Path
    seed: int
    world: World = field(init=False)

    def __post_init__(self) -> None:
        self.world = World(rank=self.rank, size=self.size, local_rank=self.rank, local_size=self.size)

    def engine(self, strategy: Mapping[str, Any]) -> Any:
        """One of ours, with memory and without values."""
        model = {"path": self.model, "dtype": "bfloat16"}
        recipe = {"name": "load", "model": model, "data": {"train": [{"path": "none"}]}, "strategy": strategy}
        typed = Recipe.model_validate(recipe)
        return prepare(build_model(typed, ModelFolder(self.model)), typed, self.world)

    def fsdp(self) -> tuple[Any, torch.optim.Optimizer]:
        """FSDP2 by hand, in fp32, with AdamW's state made: the same numbers as ours but the bfloat16 weights, which
        DCP's users do not store."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model), dtype=torch.float32)
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        return model, optimizer


@dataclass(frozen=True)
class Drawn:
    """A `FragmentReader` of values drawn by (seed, part, name)."""

    part: str
    shapes: Mapping[str, tuple[int, ...]]
    seed: int

    def names(self) -> Sequence[str]:
        return list(self.shapes)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, self.shapes[name], "F32")

    def read(self, name: str, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        with drawn_from(keyed_seed(self.seed, self.part, name)):
            whole = torch.empty(self.shapes[name]).uniform_(0, 1e-2).flatten()
        return torch.cat([whole[start:stop] for start, stop in ranges])


# --- writing --------------------------------------------------------------------------------------------------------


def write_ours(ranks: Ranks) -> None:
    """Weights in bfloat16 and fp32, both moments."""
    engine = filled(ranks, {"type": "fsdp"})
    state = {"format": 1, "optimizer": {"step": float(STEP)}}
    peers = Peers(ranks.rank, ranks.size, dist.new_group(backend="gloo"))
    writer = CheckpointWriter(str(ranks.place / "ours"), 1, lambda *_, **__: None, peers, in_place=True)
    writer.save(STEP, Content(parts_of(engine, has_adapter=False), state=state))


def filled(ranks: Ranks, strategy: Mapping[str, Any]) -> Any:
    """An engine of ours with drawn values."""
    engine = ranks.engine(strategy)
    shapes = {f.spec.name: f.spec.shape for f in engine.fragments("model")}
    for part in engine.parts:
        engine.load(part, Drawn(part.replace("model", "master"), shapes, ranks.seed))
    engine.load_optimizer_state({"step": float(STEP)})
    return engine


def write_dcp(ranks: Ranks) -> None:
    """fp32 weights and both moments."""
    model, optimizer = ranks.fsdp()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    states = {"master": get_model_state_dict(model)}
    held = get_optimizer_state_dict(model, optimizer)
    states |= {moment: {name: state[moment] for name, state in held["state"].items()} for moment in MOMENTS}
    for part, tensors in states.items():
        for name, tensor in tensors.items():
            if name in shapes:
                whole = Drawn(part, shapes, ranks.seed).read(name, ((0, tensor.numel()),)).view(tensor.shape)
                local = tensor.to_local()
                rows = [len(chunk) for chunk in whole.chunk(ranks.size)]
                begin = sum(rows[: ranks.rank])
                local.copy_(whole[begin : begin + len(local)])
    set_optimizer_state_dict(model, optimizer, held)
    dcp.save({"model": states["master"], "optimizer": held}, checkpoint_id=str(ranks.place / "dcp"))


def write_deepspeed(ranks: Ranks) -> None:
    """ZeRO-3's own."""
    engine = filled(ranks, ZERO3)
    engine._publish(engine.module, None)
    engine.module.save_checkpoint(str(ranks.place / "deepspeed"), tag="saved")


WRITERS: Mapping[str, Callable[[Ranks], None]] = {"ours": write_ours, "dcp": write_dcp, "deepspeed": write_deepspeed}


# --- loading --------------------------------------------------------------------------------------------------------

Load = Callable[[], Callable[[], Iterator[torch.Tensor]]]
"""Fills what was made for it; gives what yields this rank's fp32 values then."""


def load_ours(ranks: Ranks, strategy: Mapping[str, Any]) -> Load:
    """As a run resumes."""
    engine = ranks.engine(strategy)

    def load() -> Callable[[], Iterator[torch.Tensor]]:
        load_parts(engine, str(next((ranks.place / "ours").glob("step-*"))), has_adapter=False)
        return lambda: (f.values for part in ("master", *MOMENTS) for f in engine.fragments(part))

    return load


def load_dcp(ranks: Ranks) -> Load:
    """`dcp.load` into FSDP2's state dicts, which reshards."""
    model, optimizer = ranks.fsdp()

    def load() -> Callable[[], Iterator[torch.Tensor]]:
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=str(ranks.place / "dcp"))
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return partial(_of_fsdp, model, optimizer)

    return load


def _of_fsdp(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter.to_local()
        yield from (optimizer.state[parameter][moment].to_local() for moment in MOMENTS)


def load_deepspeed(ranks: Ranks, *, universal: bool) -> Load:
    """`load_checkpoint`; at another world size behind a conversion to a universal checkpoint, by rank 0."""
    engine = ranks.engine(ZERO3)
    folder = ranks.place / "deepspeed"

    def load() -> Callable[[], Iterator[torch.Tensor]]:
        if universal:
            if ranks.rank == 0:
                shutil.rmtree(folder / "universal", ignore_errors=True)
                _convert(folder / "saved", folder / "universal")
            dist.barrier()
            engine.module._config.load_universal_checkpoint = True
        tag = "universal" if universal else "saved"
        path, _ = engine.module.load_checkpoint(str(folder), tag=tag)
        assert path is not None, "DeepSpeed found no checkpoint"
        return lambda: (f.values for part in ("master", *MOMENTS) for f in engine.fragments(part))

    return load


def _convert(source: Path, target: Path) -> None:
    command = ["--input_folder", str(source), "--output_folder", str(target)]
    workers = ["--num_extract_workers", "2", "--num_merge_workers", "2"]
    program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *command, *workers]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def load_raw(ranks: Ranks) -> Load:
    """The limit: every rank reads its share of the bytes of our files into memory that is there."""
    files = sorted((ranks.place / "ours").rglob("*.safetensors"))
    shares = [(path, path.stat().st_size // ranks.size) for path in files]
    buffers = [torch.ones(share, dtype=torch.uint8).numpy() for _, share in shares]

    def load() -> Callable[[], Iterator[torch.Tensor]]:
        for (path, share), buffer in zip(shares, buffers, strict=True):
            with path.open("rb", buffering=0) as file:
                done = 0
                while done < share:
                    done += os.preadv(file.fileno(), [buffer.data[done:]], ranks.rank * share + done)
        return lambda: iter(())

    return load


SIDES: Mapping[str, Callable[[Ranks], Load]] = {
    "raw": load_raw,
    "ours_fsdp": partial(load_ours, strategy={"type": "fsdp"}),
    "ours_zero3": partial(load_ours, strategy=ZERO3),
    "dcp": load_dcp,
    "deepspeed": partial(load_deepspeed, universal=False),
    "deepspeed_universal": partial(load_deepspeed, universal=True),
}


def take_turn(ranks: Ranks, side: str) -> Turn:
    """One load by one side, begun by all ranks at once."""
    load = SIDES[side](ranks)
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to now (proc(5))
    read, begin = _read_so_far(), time.perf_counter()
    values = load()
    dist.barrier()
    seconds = time.perf_counter() - begin
    read, peak = _read_so_far() - read, resident_bytes("VmHWM")
    digest = torch.zeros((), dtype=torch.float64)
    for tensor in values():
        digest += tensor.double().sum()
    gc.collect()
    held = resident_bytes("VmRSS")
    dist.all_reduce(digest)
    return Turn(seconds, read, peak, max(0, peak - held), float(digest))


def _read_so_far() -> int:
    """Bytes that this process has asked the system for, from disk or from its page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def serve(rank: int, size: int, model: str, place: str, meeting: str, seed: int, words: str, line: Connection) -> None:
    """A rank's turn, `write NAME` or `load NAME`. `meeting`: a new file's path, where the ranks find each other."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    ranks = Ranks(rank, size, model, Path(place), seed)
    what, _, name = words.partition(" ")
    line.send(WRITERS[name](ranks) if what == "write" else take_turn(ranks, name))
    dist.destroy_process_group()
