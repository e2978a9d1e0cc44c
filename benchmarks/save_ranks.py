"""The ranks of benchmarks/checkpoint_save.py: each holds shards of a random model, and saves them in several ways."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM

from ftlaunch.distributed.background import Work
from ftlaunch.distributed.checkpoint.content import Content
from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.save import CheckpointWriter
from ftlaunch.distributed.checkpoint.staging import Staging

FILE_BYTES = 512 * 2**20
"""Size of final files, for every side."""


@dataclass(frozen=True)
class Turn:
    """What one rank saw: seconds that the side counts, and by how much its resident memory rose meanwhile [bytes]."""

    seconds: float
    extra_bytes: int
    written_bytes: int


@dataclass
class Model:
    """This rank's shards (rows, evenly) of a random model in bfloat16, and what sides keep from turn to turn."""

    config: LlamaConfig
    rank: int
    size: int
    shapes: dict[str, tuple[int, ...]]
    shards: dict[str, torch.Tensor]
    tensors: dict[str, DTensor]
    staging: Staging = field(default_factory=Staging)
    writers: dict[str, CheckpointWriter] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def draw(cls, config: LlamaConfig, rank: int, size: int, seed: int) -> Model:
        """Random shards."""
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
        mesh = init_device_mesh("cpu", (size,))
        generator = torch.Generator().manual_seed(seed + rank)
        shards = {}
        for name, shape in shapes.items():
            rows = len(torch.empty(shape[0], device="meta").chunk(size)[rank])
            shards[name] = torch.empty(rows, *shape[1:], dtype=torch.bfloat16).uniform_(-1, 1, generator=generator)
        tensors = {name: DTensor.from_local(shard, mesh, [Shard(0)]) for name, shard in shards.items()}
        return cls(config, rank, size, shapes, shards, tensors)

    def fragments(self) -> Iterator[Fragment]:
        """As the engine gives them."""
        for name, shard in self.shards.items():
            row = shard[0].numel()
            start = self.rank * len(shard) * row
            ranges = ((start, start + shard.numel()),)
            yield Fragment(TensorSpec(name, self.shapes[name], "BF16"), ranges, shard.flatten())

    def files(self) -> dict[str, int]:
        """Tensor -> number of its final file, as the peers want it."""
        numbers, filled, number = {}, 0, 1
        for name, shape in self.shapes.items():
            size = 2 * torch.empty(shape, device="meta").numel()
            if filled and filled + size > FILE_BYTES:
                filled, number = 0, number + 1
            numbers[name], filled = number, filled + size
        return numbers

    def writer(self, folder: Path, *, in_place: bool) -> CheckpointWriter:
        """Ours; what it knows of the model is kept, as in a run."""
        key = f"{in_place}"
        if key not in self.writers:
            peers = Peers(self.rank, self.size, dist.new_group(backend="gloo"))
            self.writers[key] = CheckpointWriter("", 1, lambda *_, **__: None, peers, in_place=in_place)
        self.writers[key].run_url = str(folder)
        return self.writers[key]


Wait = Callable[[], None]
Side = Callable[[Model, Path], Wait | None]
"""Saves a model into a folder. What it returns is waited for after its time was taken."""


def raw(model: Model, folder: Path) -> None:
    """The limit: every rank writes its bytes from memory into a file of its own, whose space is reserved."""
    with (folder / f"rank-{model.rank}").open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, sum(2 * shard.numel() for shard in model.shards.values()))
        for shard in model.shards.values():
            file.write(shard.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def ours(model: Model, folder: Path, *, in_place: bool = True) -> None:
    """A whole save of ours: written, synced, read back in samples, committed."""
    model.writer(folder, in_place=in_place).save(1, Content({"model": model.fragments}))


def rank_0_gather(model: Model, folder: Path) -> None:
    """One tensor after the other is gathered; rank 0 keeps them all and calls `save_pretrained`."""
    whole = {}
    for name, tensor in model.tensors.items():
        full = tensor.full_tensor()
        if model.rank == 0:
            whole[name] = full
    if model.rank == 0:
        with torch.device("meta"):
            published = LlamaForCausalLM(model.config)
        published.save_pretrained(folder, state_dict=whole, max_shard_size=FILE_BYTES)
        sync_files(folder)


def dcp_consolidated(model: Model, folder: Path) -> None:
    """DCP's shards, then consolidation on every rank."""
    sharded = folder / "sharded"
    writer = HuggingFaceStorageWriter(str(sharded), fqn_to_index_mapping=model.files(), save_distributed=True)
    dcp.save(dict(model.tensors), storage_writer=writer)
    consolidate_safetensors_files_on_every_rank(str(sharded), str(folder), model.files())
    dist.barrier()
    if model.rank == 0:
        sync_files(folder)


def hf_storage_writer(model: Model, folder: Path) -> None:
    """The same by the writer itself, which consolidates on rank 0."""
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=model.files(), save_distributed=True, enable_consolidation=True
    )
    dcp.save(dict(model.tensors), storage_writer=writer)
    if model.rank == 0:
        sync_files(folder)


def sync_files(folder: Path) -> None:
    """Peers leave their files to the page cache; the limit and ours do not."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


# --- what holds training up -----------------------------------------------------------------------------------------


def memcpy(model: Model, folder: Path) -> None:
    """The limit: a copy of the same bytes into memory that is there."""
    for name, shard in model.shards.items():
        if name not in model.buffers:
            model.buffers[name] = torch.ones_like(shard)
        model.buffers[name].copy_(shard)


def ours_async(model: Model, folder: Path) -> Wait:
    """The copy, and the start of the work in the background."""
    writer, content = model.writer(folder, in_place=True), Content({"model": model.fragments})
    copied = model.staging.copy(content, writer.plan(content))
    return Work(partial(_save, writer, copied), "checkpoint").wait


def _save(writer: CheckpointWriter, content: Content) -> None:
    writer.save(1, content)


def dcp_async(model: Model, folder: Path, *, kind: AsyncCheckpointerType) -> Wait:
    """`dcp.async_save` until it returns."""
    done = dcp.async_save(dict(model.tensors), checkpoint_id=str(folder), async_checkpointer_type=kind)
    assert isinstance(done, Future)
    return partial(_wait, done)


def _wait(done: Future[Any]) -> None:
    done.result()


SIDES: Mapping[str, Side] = {
    "raw": raw,
    "ours": ours,
    "ours_by_owners": partial(ours, in_place=False),
    "rank_0_gather": rank_0_gather,
    "dcp_consolidated": dcp_consolidated,
    "hf_storage_writer": hf_storage_writer,
    "memcpy": memcpy,
    "ours_async": ours_async,
    "dcp_async_thread": partial(dcp_async, kind=AsyncCheckpointerType.THREAD),
    "dcp_async_process": partial(dcp_async, kind=AsyncCheckpointerType.PROCESS),
}


def take_turn(model: Model, side: str, folder: Path) -> Turn:
    """One save by one side, begun by all ranks at once."""
    if model.rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to now (proc(5))
    begin = time.perf_counter()
    wait = SIDES[side](model, folder)
    seconds = time.perf_counter() - begin
    extra = resident_bytes("VmHWM") - before
    if wait is not None:
        wait()
    dist.barrier()
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if model.rank == 0 else 0
    dist.barrier()
    if model.rank == 0:
        shutil.rmtree(folder)
        os.sync()  # deleting is nobody's turn
    return Turn(seconds, extra, written)


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def serve(rank: int, size: int, config: Mapping[str, Any], seed: int, place: str, line: Connection) -> None:
    """A rank: takes turns by name until the line is closed."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{place}/rendezvous-{size}", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    model = Model.draw(LlamaConfig(**config), rank, size, seed)
    line.send(sum(shard.numel() * 2 for shard in model.shards.values()))
    turn = 0
    with suppress(EOFError):  # nobody has another turn to give
        while True:
            side, turn = line.recv(), turn + 1
            line.send(take_turn(model, side, Path(place) / f"{size}-{turn}"))
    dist.destroy_process_group()
