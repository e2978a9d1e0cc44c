"""Run a function on several ranks: forked processes with a gloo group, over a rendezvous file.

Forking lets the function be a closure and costs no second import of torch. Ranks inherit OMP_NUM_THREADS=1, without
which a forked OpenMP program may hang.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

GRACE_S = 20.0
"""How long ranks may go on after one has failed: enough to see their own errors, not a hang."""


class RanksFailed(AssertionError):
    """Some ranks raised or died; the message holds their tracebacks."""


@dataclass
class Outcome:
    """How one rank ended: with a value, with a traceback, or without a word."""

    value: Any = None
    error: str | None = None
    exit_code: int | None = None


@dataclass
class Ranks:
    """Ranks that were started."""

    processes: list[Any]
    connections: list[Connection]
    folder: tempfile.TemporaryDirectory[str]
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def kill(self, rank: int) -> None:
        """SIGKILL, as from a lost machine."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def join(self, timeout_s: float = 120.0, grace_s: float = GRACE_S) -> list[Outcome]:
        """Wait for all ranks; those that are still there after the time-out, or too long after another failed, are
        killed and say so."""
        deadline = time.monotonic() + timeout_s
        pending = dict(enumerate(self.connections))
        while pending and time.monotonic() < deadline:
            ready = wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic()))
            for rank in [rank for rank, connection in pending.items() if connection in ready]:
                self._receive(rank, pending.pop(rank))
                if self.outcomes[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + grace_s)
        for rank in pending:
            self.kill(rank)
            self.outcomes[rank] = Outcome(error=f"rank {rank} was still running and was killed")
        for process in self.processes:
            process.join()
        self.folder.cleanup()
        return [self.outcomes[rank] for rank in range(len(self.processes))]

    def _receive(self, rank: int, connection: Connection) -> None:
        try:
            self.outcomes[rank] = connection.recv()
        except EOFError:
            self.processes[rank].join()
            code = self.processes[rank].exitcode
            self.outcomes[rank] = Outcome(error=f"rank {rank} died with exit code {code}", exit_code=code)


def start_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0, connect: bool = True
) -> Ranks:
    """Begin `fn(rank, world_size, *args)` on every rank. `timeout_s` is that of the process group; without `connect`
    there is none, for functions that form their own."""
    context = multiprocessing.get_context("fork")
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="ranks-")
    ranks = Ranks([], [], folder)
    for rank in range(world_size):
        here, there = context.Pipe(duplex=False)
        store = str(Path(folder.name) / "rendezvous")
        target = partial(_connected, fn, store, timeout_s) if connect else fn
        process = context.Process(target=_rank, args=(target, rank, world_size, args, there), daemon=True)
        with nothing_to_collect():
            process.start()
        there.close()
        ranks.processes.append(process)
        ranks.connections.append(here)
    return ranks


@contextmanager
def nothing_to_collect() -> Iterator[None]:
    """A process forked in here never collects what it has inherited: the destructor of a gloo group, say, joins threads
    that the fork does not have, and hangs. Garbage is frozen with the rest; to collect it first would walk through all
    of torch and transformers, half a second for each rank."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0, connect: bool = True
) -> list[Any]:
    """`fn(rank, world_size, *args)` on every rank, within a gloo group that is the default one (see `connect` above);
    its values by rank.

    Raises RanksFailed with the tracebacks of all ranks that failed.
    """
    outcomes = start_distributed(fn, world_size, *args, timeout_s=timeout_s, connect=connect).join(timeout_s)
    errors = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
    if errors:
        raise RanksFailed("\n".join(errors))
    return [outcome.value for outcome in outcomes]


def _rank(fn: Callable[..., Any], rank: int, world_size: int, args: Sequence[Any], connection: Connection) -> None:
    try:
        outcome = Outcome(value=fn(rank, world_size, *args))
    except BaseException:
        outcome = Outcome(error=traceback.format_exc())
    connection.send(outcome)


def _connected(fn: Callable[..., Any], store: str, timeout_s: float, rank: int, world_size: int, *args: Any) -> Any:
    """Run `fn` within a gloo group."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    value = fn(rank, world_size, *args)
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    return value
