"""Processes that stand by, on a Ray of this machine: they become ranks, and are none the worse for it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import run

from ftlaunch.cluster.base import Demand
from ftlaunch.recipes.schema_cluster import LocalCluster, RayCluster


def test_they_take_the_places_of_ranks_and_others_theirs(tmp_path):
    """In a process of its own, whose Ray has read the settings of nobody else's."""
    program = str(Path(__file__).parents[1] / "support" / "standing_by.py")
    code, said = run([sys.executable, program], tmp_path)
    assert code == 0, said


def test_what_ray_imports_is_left_to_it():
    from ftlaunch.launcher import rank_process

    taken_in = rank_process.loaded()
    assert {"json", "ray"} <= set(sys.modules)
    assert "json" in taken_in
    assert [name for name in taken_in if name == "ray" or name.startswith("ray.")] == []


def test_without_memory_none_stands_by(monkeypatch):
    from ftlaunch.launcher import spares

    monkeypatch.setattr(spares, "free_bytes", lambda: 2 * spares.LEFT_BYTES - 1)
    with pytest.raises(MemoryError, match="no process stands by"):
        spares.RayTrainWorkerStandingBy(1, 1, [])


def test_gpus_of_a_node_go_to_all_who_stand_by_or_to_none(monkeypatch):
    """Without GPUs and Ray: who had which is all that counts."""
    from ftlaunch.launcher import spares

    class Actor:
        def __init__(self, pid: int | None) -> None:
            self.pid, self.get_metadata = pid, self

        def remote(self) -> int | None:
            return self.pid or -1

    killed: list[Actor] = []
    monkeypatch.setattr(spares.ray, "kill", killed.append)
    monkeypatch.setattr(spares.ray, "wait", lambda *_, **__: None)
    monkeypatch.setattr(spares, "_answer", lambda pid: metadata("a", pid, []) if pid > 0 else None)
    made = spares.Spares(Demand(1, 2, uses_gpus=True, cpus_per_rank=1))
    ranks = [metadata("a", 1, ["3"]), metadata("a", 2, ["5"])]
    made.begin([SimpleNamespace(actor=None, metadata=rank) for rank in ranks])
    made._standing = {"a": spares.deque([Actor(7), Actor(8)])}
    assert [spare.metadata.accelerator_ids for spare in made.take(["a", "a"])] == [{"GPU": ["3"]}, {"GPU": ["5"]}]
    made._standing = {"a": spares.deque([Actor(9), Actor(None)])}
    assert made.take(["a", "a"]) == [None, None]
    assert len(killed) == 2


def metadata(node: str, pid: int, gpus: list[str]) -> Any:
    from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata

    return ActorMetadata("host", node, "10.0.0.1", pid, {"GPU": gpus})


def test_where_processes_may_stand_by():
    from ftlaunch.launcher.supervision import stand_by

    cores, gpus = (Demand(1, 2, uses_gpus=uses, cpus_per_rank=1) for uses in (False, True))
    assert stand_by(LocalCluster(), gpus)
    assert stand_by(RayCluster(), cores)
    assert not stand_by(RayCluster(), gpus)
    assert not stand_by(LocalCluster(standby=False), cores)
