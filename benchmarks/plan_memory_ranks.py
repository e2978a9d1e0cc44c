"""The ranks of benchmarks/plan_memory.py: each is a real rank of a run, whose allocations are counted.

What is counted is every tensor's memory, as torch's CPU allocator hands it out and takes it back (its profiler's
`[memory]` events): what `torch.cuda.max_memory_allocated` is on a GPU, byte for byte what tensors take. Not counted is
what no tensor holds: the interpreter, libraries, gloo's and oneDNN's buffers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from ftlaunch.distributed import entry
from ftlaunch.distributed.estimate.memory import estimate
from ftlaunch.distributed.estimate.setting import Setting
from ftlaunch.distributed.loop import Run, train
from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.outline import outline_of
from ftlaunch.distributed.world import World
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

STEPS = "ftlaunch steps"


class QuietMonitor:
    """Nobody watches, nobody interrupts."""

    def emit(self, event: Any) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


class Job(NamedTuple):
    """A run to take part in: its recipe, and where its ranks meet."""

    recipe: Mapping[str, Any]
    nodes: int
    rendezvous: str


def serve(rank: int, size: int, line: Connection) -> None:
    """A rank of one run after the other, until the line is closed."""
    torch.set_num_threads(1)
    with suppress(EOFError):  # there is no other run
        while True:
            line.send(take_part(rank, size, line.recv()))


def take_part(rank: int, size: int, job: Job) -> dict[str, Any]:
    """One rank of a whole run; what it took, and what was planned for it [bytes]."""
    gc.collect()  # what the run before has left
    typed, local = Recipe.model_validate(job.recipe), size // job.nodes
    world = World(rank, size, rank % local, local, rank // local, job.nodes)
    with (
        patch.object(entry, "train", counted),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
    ):
        entry.run_rank(entry.Job(LoadedRecipe(typed, "", (), ()), world, job.rendezvous, QuietMonitor(), ()))
    return {**peaks(profiler), "plan": planned(typed, world)}


def counted(run: Run) -> str:
    """The steps, with a mark on them."""
    with record_function(STEPS):
        return train(run)


def planned(recipe: Recipe, world: World) -> dict[str, Any]:
    """The estimate for this rank, by part."""
    folder = find_model(recipe.model.path)
    outline = outline_of(build_model(recipe, folder), folder.config)
    assert outline is not None
    memory = estimate(recipe, outline, Setting(world.size, world.num_nodes, "cpu"))
    return asdict(memory) | {"total": memory.total}


def peaks(profiler: profile) -> dict[str, int]:
    """Most bytes held before the steps (`start`) and during them (`peak`), and what is held at their end (`kept`)."""
    begin, end, changes = timeline(profiler)
    found = {"start": 0, "peak": 0, "kept": 0}
    for time, held in running_totals(changes):
        if time < begin:
            found["start"] = max(found["start"], held)
        elif time <= end:
            found["peak"] = max(found["peak"], held)
            found["kept"] = held
    return found


def timeline(profiler: profile) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Begin and end of the steps, and (time [ns], address, bytes) of all allocations; releases are negative."""
    begin = end = 0
    changes = []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == STEPS:
            begin, end = event.start_time_ns, event.end_time_ns
        elif event.tag == _EventType.Allocation:
            address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
            changes.append((event.start_time_ns, address, size))
            if size > 0 and (collective := collective_of(event)) is not None:
                changes.append((collective.end_time_ns, address, -size))
    return begin, end, sorted(changes)


def collective_of(event: Any) -> Any:
    """The collective that an allocation is made in, if any: gloo's copy of what it sends, which a thread of its own
    releases, unseen by the profiler."""
    while event is not None and not event.name.startswith("c10d::"):
        event = event.parent
    return event


def running_totals(changes: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """(time [ns], bytes held). What is released twice counts once."""
    sizes: dict[int, int] = {}
    held = 0
    for time, address, size in changes:
        held -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            held += size
        yield time, held
