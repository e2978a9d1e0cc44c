"""How much memory a rank takes, and what is said when it is too much."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from ..recipes.errors import RankError
from .world import World

NO_HOST_MEMORY = "can't allocate memory"
"""What torch's allocator of host memory says, in an error of no class of its own."""


def memory_bytes(world: World) -> int:
    """Peak memory of this rank on its GPU, or its resident size on the CPU."""
    if world.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(world.device)
    return int(_this_process().memory_info().rss)


@functools.cache
def _this_process() -> psutil.Process:
    return psutil.Process()  # reads when the process started, which is no work for every step


@contextmanager
def within_memory(world: World, doing: str, advise: Callable[[], str]) -> Iterator[None]:
    """Raises RankError that says what takes the memory, and what to change, where that of a device does not suffice."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and NO_HOST_MEMORY not in str(error):
            raise
        device = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        said = str(error).strip().rstrip(".")
        raise RankError(f"{doing}: rank {world.rank} is out of {device}: {said}.\n{advise()}") from error
