"""Processes that stand by for ranks: what Python, Ray and torch take to be loaded is done before it is needed.

A rank that is started again spends most of its time on imports. So while ranks run, each node has as many processes in
readiness as it has ranks; when the ranks are started again, these become them, and others take their places later.

Ray does not hand a process that holds nothing the cores and GPUs of a rank. They stay reserved by the ranks' placement
group all the same, and what Ray would tell the process about them it is told here.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..cluster.base import Demand
from ..distributed.data.memory import free_bytes
from .rank_process import RayTrainWorkerWarmingUp, loaded, warm_up

AFTER_S = 15.0
"""Behind a start of ranks: those that stand by are not to take cores from it."""

LEFT_BYTES = 2 * 10**9
"""Of a host's memory, free for each process before it is kept."""

ANSWER_S = 1.0
"""For one that stands by to answer; a new process takes longer."""

ENDING_S = 20.0
"""For the ranks of the last start to have ended, and their GPUs to be free again."""


class RayTrainWorkerStandingBy(RayTrainWorkerWarmingUp):
    """A process that may become a rank, with `threads` cores. `modules`: what a rank has imported."""

    def __init__(self, threads: int, others: int, modules: Sequence[str]) -> None:
        """Raises MemoryError where there is too little for it and `others` like it."""
        if free_bytes() < (1 + others) * LEFT_BYTES:
            raise MemoryError("no process stands by: memory is short")
        # Ray sets it from the cores that a process holds, unless the user has.
        if b"\0OMP_NUM_THREADS=" not in b"\0" + Path("/proc/self/environ").read_bytes():
            os.environ["OMP_NUM_THREADS"] = str(threads)
        warm_up.stands_by = True
        super().__init__(modules)


@dataclass(frozen=True)
class Spare:
    """One of them that answers. `metadata`: as Ray Train has it of its workers."""

    actor: Any
    metadata: Any


class Spares:
    """Those of one run. `clock` in seconds."""

    def __init__(self, demand: Demand, clock: Callable[[], float] = time.monotonic) -> None:
        self._demand, self._clock = demand, clock
        self._standing: dict[str, deque[Any]] = {}
        self._ranks: list[Any] = []
        """Ray Train's metadata of the ranks of the last start."""
        self._first: Any = None
        """The first one of them."""
        self._due_s = float("inf")

    def begin(self, workers: Sequence[Any]) -> None:
        """Ranks have been started: Ray Train's workers."""
        self._ranks, self._first = [worker.metadata for worker in workers], workers[0].actor
        self._due_s = self._clock() + AFTER_S

    def look(self) -> None:
        """While ranks run: fill up, when the time has come."""
        if self._clock() < self._due_s:
            return
        self._due_s = float("inf")
        modules = self._first.execute.remote(loaded)
        for node, ranks in Counter(rank.node_id for rank in self._ranks).items():
            standing = self._standing.setdefault(node, deque())
            for others in reversed(range(ranks - len(standing))):
                standing.append(self._start(node, others, modules))

    def _start(self, node: str, others: int, modules: Any) -> Any:
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        spare = ray.remote(num_cpus=0)(RayTrainWorkerStandingBy).options(scheduling_strategy=place)
        return spare.remote(self._demand.cpus_per_rank, others, modules)

    def take(self, nodes: Sequence[str]) -> list[Spare | None]:
        """For ranks on these nodes; None: there is none for one."""
        self._due_s = float("inf")
        actors = [self._standing[node].popleft() if self._standing.get(node) else None for node in nodes]
        asked = [None if actor is None else actor.get_metadata.remote() for actor in actors]
        if waiting := [one for one in asked if one is not None]:
            ray.wait(waiting, num_returns=len(waiting), timeout=ANSWER_S)
        answers: list[Any] = [None if one is None else _answer(one) for one in asked]
        usable = [
            answer is not None and self._suffices(node, nodes, answers)
            for node, answer in zip(nodes, answers, strict=True)
        ]
        for actor, use in zip(actors, usable, strict=True):
            if actor is not None and not use:
                ray.kill(actor)
        gpus = self._gpus() if self._demand.uses_gpus else {}
        return [
            Spare(actor, replace(answer, accelerator_ids=gpus[node].popleft()) if gpus else answer) if use else None
            for node, actor, answer, use in zip(nodes, actors, answers, usable, strict=True)
        ]

    def _suffices(self, node: str, nodes: Sequence[str], answers: Sequence[Any]) -> bool:
        """On GPUs all ranks of a node stand by, or none: which GPU Ray would give to a new one is not known before."""
        mine = [answer for each, answer in zip(nodes, answers, strict=True) if each == node]
        return not self._demand.uses_gpus or (None not in mine and len(mine) == len(self.earlier(node)))

    def _gpus(self) -> dict[str, deque[Any]]:
        """What the ranks of each node had, one after another, as Ray Train has it."""
        return {
            node: deque(rank.accelerator_ids for rank in self._ranks if rank.node_id == node)
            for node in {rank.node_id for rank in self._ranks}
        }

    def earlier(self, node: str) -> list[int]:
        """Processes of the ranks of the last start on a node."""
        return [rank.pid for rank in self._ranks if rank.node_id == node]


def _answer(asked: Any) -> Any:
    with suppress(RayError, GetTimeoutError):  # its node is gone, or it found too little memory
        return ray.get(asked, timeout=0)
    return None


def wait_for_end(pids: Sequence[int]) -> None:
    """In a process that is about to become a rank: until those before it have ended."""
    deadline_s = time.monotonic() + ENDING_S
    others = [pid for pid in pids if pid != os.getpid()]
    while any(map(_lives, others)) and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
