"""Local processes that are ranks, for `ftlaunch selftest`: started once, and given one layout after the other.

Every process serves as rank r of each layout that has so many ranks. A process that has failed may hold half of a
process group, so after a failure all of them are started again.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from ..distributed.world import World
from ..recipes.errors import FtlaunchError, UserError
from ..recipes.load import LoadedRecipe
from ..recipes.problems import located

START_METHOD = "spawn"
"""A process that has used CUDA or threads must not be forked."""

GRACE_S = 20.0
"""For the other ranks to tell of their own mistakes after one has failed; they may be waiting for it for ever."""

LOG_TAIL = 2_000
"""Characters of a log that are shown."""


class Task(NamedTuple):
    """One layout. `device`: "cuda" or "cpu"."""

    loaded: LoadedRecipe
    ranks: int
    nodes: int
    device: str
    rendezvous: str


class Step(NamedTuple):
    """What rank 0 saw of an optimizer step."""

    values: Mapping[str, float]


class Done(NamedTuple):
    """A rank took all steps."""


class Failed(NamedTuple):
    """A rank did not. `is_bug`: it is nothing that the user could mend in the recipe."""

    message: str
    is_bug: bool


@dataclass
class RankPool:
    """The processes. `folder` is where they write down what libraries print."""

    size: int
    folder: Path
    _processes: list[BaseProcess] = field(default_factory=list)
    _connections: list[Connection] = field(default_factory=list)

    def run(self, task: Task, on_step: Callable[[Mapping[str, float]], None]) -> Failed | None:
        """Run one layout; what went wrong, if anything did."""
        if not self._processes or not all(process.is_alive() for process in self._processes):
            self.stop()
            self._start()
        connections = self._connections[: task.ranks]
        for connection in connections:
            connection.send(task)
        failure = self._listen(connections, on_step)
        if failure is not None:
            self.stop()
        return failure

    def _listen(
        self, connections: Sequence[Connection], on_step: Callable[[Mapping[str, float]], None]
    ) -> Failed | None:
        pending = list(connections)
        failures: list[Failed] = []
        deadline: float | None = None
        while pending and (deadline is None or time.monotonic() < deadline):
            for connection in wait(pending, timeout=None if deadline is None else deadline - time.monotonic()):
                assert isinstance(connection, Connection)
                answer = self._receive(connection)
                if isinstance(answer, Step):
                    on_step(answer.values)
                    continue
                pending.remove(connection)
                if isinstance(answer, Failed):
                    failures.append(answer)
                    deadline = deadline or time.monotonic() + GRACE_S
        # Ranks that only saw a connection break say less than the one that broke it.
        return min(failures, key=lambda failure: failure.is_bug, default=None)

    def _receive(self, connection: Connection) -> Step | Done | Failed:
        try:
            answer: Step | Done | Failed = connection.recv()
            return answer
        except (EOFError, ConnectionResetError):
            rank = self._connections.index(connection)
            self._processes[rank].join()
            code, tail = self._processes[rank].exitcode, self._log(rank).read_text(errors="replace")[-LOG_TAIL:]
            return Failed(f"rank {rank} died with exit code {code}\n{tail}", is_bug=True)

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, there, str(self._log(rank))), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes.clear()
        self._connections.clear()


def serve(rank: int, connection: Connection, log: str) -> None:
    """One process: run every task that comes, until the launcher is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher ends its processes
    with Path(log).open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            connection.send(_answer(connection.recv(), rank, connection))
            _let_go()
    os._exit(0)  # destructors of process groups may wait for ranks that are gone


def _answer(task: Task, rank: int, connection: Connection) -> Done | Failed:
    from ..distributed.entry import Job
    from ..distributed.trial import try_steps

    try:
        try_steps(Job(task.loaded, world_of(task, rank), task.rendezvous, _Teller(connection, speaks=rank == 0)))
    except FtlaunchError as error:
        return Failed(located(error, task.loaded.origins), is_bug=not isinstance(error, UserError))
    except Exception:
        return Failed(traceback.format_exc(), is_bug=True)
    return Done()


def world_of(task: Task, rank: int) -> World:
    """A rank's place where each logical node has as many ranks."""
    each = task.ranks // task.nodes
    return World(
        rank=rank,
        size=task.ranks,
        local_rank=rank % each,
        local_size=each,
        node_rank=rank // each,
        num_nodes=task.nodes,
        device=f"cuda:{rank}" if task.device == "cuda" else "cpu",
    )


def _let_go() -> None:
    """Of the last layout's memory."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Teller:
    """The rank's monitor: steps go to the launcher."""

    connection: Connection
    speaks: bool

    def emit(self, event: Mapping[str, Any]) -> None:
        if self.speaks and event["kind"] == "step":
            self.connection.send(Step({name: value for name, value in event.items() if name != "kind"}))

    def stop_requested(self) -> bool:
        return False
