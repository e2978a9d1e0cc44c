"""What the sides of benchmarks/checkpoint_save.py save: a rank's shards of a random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM

from ftlaunch.distributed.checkpoint.content import Content
from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.save import CheckpointWriter
from ftlaunch.distributed.checkpoint.staging import Staging

FILE_BYTES = 512 * 2**20
"""Size of final files, for every side."""

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass
class Model:
    """This rank's shards (rows, evenly) of a random model, and what sides keep from turn to turn.

    `shards` and `tensors` by part and name; the values of the parts are the random weights."""

    config: LlamaConfig
    rank: int
    size: int
    shapes: dict[str, tuple[int, ...]]
    shards: dict[str, dict[str, torch.Tensor]]
    tensors: dict[str, dict[str, DTensor]]
    staging: Staging = field(default_factory=Staging)
    writers: dict[str, CheckpointWriter] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def draw(cls, config: LlamaConfig, parts: Mapping[str, torch.dtype], rank: int, size: int, seed: int) -> Model:
        """Random shards."""
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
        mesh = init_device_mesh("cpu", (size,))
        generator = torch.Generator().manual_seed(seed + rank)
        shards: dict[str, dict[str, torch.Tensor]] = {part: {} for part in parts}
        for part, dtype in parts.items():
            for name, shape in shapes.items():
                rows = len(torch.empty(shape[0], device="meta").chunk(size)[rank])
                shard = torch.empty(rows, *shape[1:], dtype=dtype)
                shards[part][name] = shard.uniform_(-1, 1, generator=generator)
        tensors = {
            part: {name: DTensor.from_local(shard, mesh, [Shard(0)]) for name, shard in ones.items()}
            for part, ones in shards.items()
        }
        return cls(config, rank, size, shapes, shards, tensors)

    def all_shards(self) -> Iterator[torch.Tensor]:
        """Of all parts."""
        return (shard for ones in self.shards.values() for shard in ones.values())

    def num_bytes(self) -> int:
        """Of this rank's shards."""
        return sum(shard.nbytes for shard in self.all_shards())

    def fragments(self, part: str) -> Iterator[Fragment]:
        """As the engine gives them."""
        for name, shard in self.shards[part].items():
            row = shard[0].numel()
            start = self.rank * len(shard) * row
            ranges = ((start, start + shard.numel()),)
            yield Fragment(TensorSpec(name, self.shapes[name], NAMES[shard.dtype]), ranges, shard.flatten())

    def content(self) -> Content:
        """What ours saves."""
        return Content({part: partial(self.fragments, part) for part in self.shards})

    def writer(self, place: str, *, in_place: bool) -> CheckpointWriter:
        """Ours; what it knows of the model is kept, as in a run."""
        key = f"{in_place}"
        if key not in self.writers:
            peers = Peers(self.rank, self.size, dist.new_group(backend="gloo"))
            self.writers[key] = CheckpointWriter(place, 1, lambda *_, **__: None, peers, in_place=in_place)
        self.writers[key].run_url = place
        return self.writers[key]


Wait = Callable[[], None]
Side = Callable[[Model, str], Wait | None]
"""Saves a model to a folder or URL. What it returns is waited for after its time was taken."""
