"""A driver that begins where another has died, and one under which Ray ends."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from ftlaunch.cluster.base import Demand
from ftlaunch.cluster.restarts import AGAIN
from ftlaunch.distributed.again import Flags
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher import start, supervisor
from ftlaunch.launcher.budget import Budget, read_failures
from ftlaunch.launcher.cli import guarded
from ftlaunch.launcher.control import Ending
from ftlaunch.launcher.drive import LOG, Driven
from ftlaunch.launcher.failure import Failure
from ftlaunch.launcher.handover import pack
from ftlaunch.launcher.keep import Beginning
from ftlaunch.recipes.errors import InfrastructureError, UserError
from ftlaunch.recipes.load import LoadedRecipe, load_recipe

KILLED = "the driver was killed (SIGKILL)"


@pytest.fixture
def loaded(place: Path) -> LoadedRecipe:
    return load_recipe(place / "bot.yaml", [], environ={})


def drive(loaded: LoadedRecipe, beginning: Beginning, monkeypatch, ending: Ending | Exception) -> tuple[int, str]:
    """Exit code and what is said."""

    def supervise(*_: object) -> Ending:
        if isinstance(ending, Exception):
            raise ending
        return ending

    monkeypatch.setattr(supervisor, "supervise", supervise)
    console = Console(width=200, record=True, force_terminal=False)
    code = start.run_on(lambda: None, loaded, Flags(), console, beginning)
    return code, " ".join(console.export_text().split())


def run_of(loaded: LoadedRecipe) -> RunDirectory:
    return RunDirectory(f"{loaded.recipe.checkpoint.path}/{loaded.recipe.name}")


def test_a_driver_that_takes_over_says_why_and_counts_it(loaded, monkeypatch):
    run_of(loaded).claim_attempt(world_size=1, command=())  # by this very process, which is alive
    monkeypatch.setattr(start, "OLD_RANKS_S", 0.0)
    with pytest.raises(UserError, match="is running"):
        drive(loaded, Beginning("two"), monkeypatch, Ending("failed", "no", 1))
    code, said = drive(loaded, Beginning("one", KILLED, is_kept=True), monkeypatch, Ending("failed", "no", 1))
    assert code == 1
    assert f"warning: {KILLED}; it is started again, from the beginning" in said
    assert [(one.kind, one.by, one.launch) for one in read_failures(run_of(loaded))] == [("driver", "driver", "one")]


def test_a_node_that_is_lost_counts_once(loaded, monkeypatch):
    """For its ranks, who notice it first, and not again when the driver begins elsewhere; but then for the driver."""
    run = run_of(loaded)
    run.finish_attempt(run.claim_attempt(world_size=1, command=()), "failed")
    Budget(run, "one", 3).spend(Failure("node", "again", "the node is gone"), "ranks")
    for _ in range(2):
        drive(loaded, Beginning("one", "its node was lost", is_kept=True), monkeypatch, Ending("failed", "no", 2))
    assert [(one.by, one.counts) for one in read_failures(run)] == [
        ("ranks", True),
        ("driver", False),
        ("driver", True),
    ]


def test_drivers_that_die_too_often_are_not_started_again(loaded, monkeypatch):
    for _ in range(loaded.recipe.cluster.max_restarts):
        drive(loaded, Beginning("one", KILLED, is_kept=True), monkeypatch, Ending("failed", "no", 2))
    with pytest.raises(InfrastructureError, match=r"not started again: .*cluster.max_restarts"):
        drive(loaded, Beginning("one", KILLED, is_kept=True), monkeypatch, Ending("failed", "no", 2))


def test_ray_that_ends_is_begun_anew_by_who_looks_after_the_driver(loaded, monkeypatch):
    lost = supervisor.ClusterLost("Ray on this machine does not answer any more")
    code, said = drive(loaded, Beginning("one", is_kept=True), monkeypatch, lost)
    assert code == AGAIN
    assert "does not answer any more; it is started again" in said
    code, _ = drive(loaded, Beginning("one", "", is_kept=True), monkeypatch, Ending("failed", "no", 2))
    assert code == 2
    assert [one.kind for one in read_failures(run_of(loaded))] == ["cluster"]  # once
    with pytest.raises(supervisor.ClusterLost):
        drive(loaded, Beginning("two"), monkeypatch, lost)


def test_a_job_that_its_cluster_starts_again_is_on_the_runs_own_budget(loaded, tmp_path, monkeypatch):
    """As KubeRay does, in other pods each time, and oftener than the budget has it: there are no two counts."""
    trained: list[str] = []

    def supervise(*_: object) -> Ending:
        trained.append("once")
        return Ending("failed", "the network failed", 2)

    monkeypatch.setattr(supervisor, "supervise", supervise)
    monkeypatch.setattr(sys, "argv", sys.argv)
    limit = loaded.recipe.cluster.max_restarts
    for number in range(3 * limit):
        assert drive_in_pod(tmp_path / f"pod-{number}", loaded, Flags()) == 2
    assert len(trained) == 1 + limit
    found = read_failures(run_of(loaded))
    assert {(one.launch, one.says) for one in found} == {("7", "its driver ended with exit code 2")}


def drive_in_pod(pod: Path, loaded: LoadedRecipe, flags: Flags) -> int:
    """The driver of job 7 in a new pod."""
    demand = Demand(nodes=1, ranks=1, uses_gpus=False, cpus_per_rank=1)
    job = {"loaded": pack(loaded), "flags": asdict(flags), "command": ["ftlaunch"], "demand": asdict(demand),
           "columns": 200, "record": {"job": "7", "cluster": {"type": "kubernetes"}}}  # fmt: skip
    pod.mkdir()
    (pod / LOG).touch()
    driven = Driven(pod, job, Beginning("7", is_kept=True))
    return driven.close(guarded(lambda: driven.run("10.0.0.1:6379")))


def test_a_fresh_run_that_goes_on_in_another_pod_is_the_same_one(loaded, tmp_path, monkeypatch):
    run_of(loaded).claim_attempt(world_size=1, command=())
    monkeypatch.setattr(supervisor, "supervise", lambda *_: Ending("failed", "the network failed", 2))
    monkeypatch.setattr(sys, "argv", sys.argv)
    for number in range(2):
        assert drive_in_pod(tmp_path / f"pod-{number}", loaded, Flags(fresh=True)) == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["bot", "bot-2"]
