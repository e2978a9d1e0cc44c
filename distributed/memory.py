"""How much memory a rank takes, and what is said when it is too much."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ..recipes.errors import UserError
from .world import World


def memory_bytes(world: World) -> int:
    """Peak memory of this rank on its GPU, or its resident size on the CPU."""
    if world.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(world.device)
    return int(_this_process().memory_info().rss)


@functools.cache
def _this_process() -> psutil.Process:
    return psutil.Process()  # reads when the process started, which is no work for every step


@contextmanager
def within_memory(world: World, doing: str) -> Iterator[None]:
    """Raises UserError that says what to change where a GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{doing}: rank {world.rank} is out of GPU memory: {error}. Lower train.micro_batch_size or "
            "data.sequence_length, set train.activation_checkpointing, train an adapter, or use more GPUs."
        ) from error
