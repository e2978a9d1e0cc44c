"""Processes that stand by, on a Ray of this machine: they become ranks, and are none the worse for it. A program, since
Ray reads its settings once in a process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray

from ftlaunch.cluster.base import Demand
from ftlaunch.launcher import rank_process, spares

CORES = 2


class Bed:
    """Ranks that run, and those that stand by for them. Time is ours."""

    def __init__(self, demand: Demand) -> None:
        self.now_s = 0.0
        self.spares = spares.Spares(demand, clock=lambda: self.now_s)
        start = ray.remote(num_cpus=demand.cpus_per_rank)(rank_process.RayTrainWorkerWarmingUp)
        self.ranks = [start.remote() for _ in range(demand.ranks)]
        self.metadata = ray.get([rank.get_metadata.remote() for rank in self.ranks])
        ray.get(self.ranks[0].execute.remote(take_in, "wave"))
        self.node = self.metadata[0].node_id

    def stand_by(self) -> list[Any]:
        """Until all do."""
        self.spares.begin(
            [SimpleNamespace(actor=a, metadata=m) for a, m in zip(self.ranks, self.metadata, strict=True)]
        )
        self.spares.look()
        assert not any(self.spares._standing.values()), "ranks are to have begun first"
        self.now_s += spares.AFTER_S
        self.spares.look()
        standing = list(self.spares._standing[self.node])
        ray.get([actor.get_metadata.remote() for actor in standing])
        return standing


def take_in(name: str) -> None:
    """A rank imports a module."""
    __import__(name)


def has(name: str) -> bool:
    """Whether a process has, once it stands by."""
    import sys

    from ftlaunch.launcher.rank_process import warm_up

    warm_up.join()
    return name in sys.modules


def threads() -> int:
    """By which torch computes."""
    import torch

    return torch.get_num_threads()


def main(demand: Demand) -> None:
    """Everything that happens to them."""
    bed = Bed(demand)
    standing = bed.stand_by()
    assert len(standing) == 2
    [wanted] = set(ray.get([rank.execute.remote(threads) for rank in bed.ranks]))
    assert wanted == CORES
    assert all(ray.get([one.execute.remote(has, "wave") for one in standing])), "as the ranks have"
    for rank in bed.ranks:
        ray.kill(rank)
    taken = bed.spares.take([bed.node, bed.node, bed.node])
    assert [spare is not None for spare in taken] == [True, True, False]
    pids = [spare.metadata.pid for spare in taken if spare]
    assert len({*pids, *(one.pid for one in bed.metadata)}) == 4
    assert ray.get([spare.actor.execute.remote(threads) for spare in taken if spare]) == [CORES, CORES]
    ray.get(taken[0].actor.execute.remote(spares.wait_for_end, bed.spares.earlier(bed.node)))
    assert not any(map(spares._lives, bed.spares.earlier(bed.node)))
    assert bed.spares.take([bed.node]) == [None], "each becomes a rank once"
    bed.metadata, bed.ranks = [one.metadata for one in taken if one], [one.actor for one in taken if one]
    again = bed.stand_by()
    assert not {actor._actor_id for actor in again} & {actor._actor_id for actor in standing}
    ray.kill(again[0])
    wait_until(lambda: not alive(again[0]))
    assert [spare is not None for spare in bed.spares.take([bed.node, bed.node])] == [False, True]


def alive(actor: Any) -> bool:
    try:
        ray.get(actor.get_metadata.remote())
    except ray.exceptions.RayActorError:
        return False
    return True


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


if __name__ == "__main__":
    # Threads are for Ray to choose.
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray.init(address="local", num_cpus=2 * CORES, include_dashboard=False, logging_level="ERROR")
    main(Demand(1, 2, uses_gpus=False, cpus_per_rank=CORES))
    ray.shutdown()
