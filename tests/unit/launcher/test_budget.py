"""How often a run may fail: one account in its directory, whoever starts it again."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from ftlaunch.distributed import storage
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher import budget as budgets
from ftlaunch.launcher.budget import Budget, read_failures
from ftlaunch.launcher.failure import Trouble, classify
from ftlaunch.recipes.errors import InfrastructureError

KILLED = classify(Trouble("WorkerCrashedError", "the worker died unexpectedly"), 1, "beta")
BROKEN = classify(Trouble("RuntimeError", "CUDA error: uncorrectable ECC error encountered"), 0, "alpha")
MOVED = classify(Trouble("Resized", "3 nodes are there"))


class Steps:
    """Stands for the checkpoints of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.newest: int | None = None
        monkeypatch.setattr(budgets, "latest_resumable", lambda _url, _report: self.newest and self)

    @property
    def step(self) -> int | None:
        return self.newest


@pytest.fixture
def steps(monkeypatch) -> Steps:
    return Steps(monkeypatch)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "run"))


def now() -> datetime:
    return datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_failures_without_progress_spend_it_and_a_checkpoint_restores_it(run, steps):
    budget = Budget(run, "one", 2, now)
    accounts = [budget.spend(KILLED, "ranks") for _ in range(2)]
    assert [(one.used, one.is_spent) for one in accounts] == [(1, False), (2, False)]
    assert accounts[1].where == "from the beginning: there is no checkpoint yet"
    steps.newest = 20
    account = budget.spend(KILLED, "ranks")
    assert (account.used, account.is_spent, account.where) == (1, False, "from step 20")
    assert not budget.spend(MOVED, "ranks").is_spent
    assert not budget.spend(KILLED, "driver").is_spent
    assert budget.spend(KILLED, "job").is_spent


def test_it_is_the_same_for_all_and_begins_anew_with_a_command(run, steps):
    Budget(run, "one", 2, now).spend(KILLED, "ranks")
    again = Budget(run, "one", 2, now)
    assert again.spend(KILLED, "driver").used == 2
    assert again.spend(KILLED, "job").is_spent
    assert Budget(run, "two", 2, now).spend(KILLED, "ranks").used == 1
    assert [(one.number, one.launch, one.by) for one in read_failures(run)] == [
        (1, "one", "ranks"),
        (2, "one", "driver"),
        (3, "one", "job"),
        (4, "two", "ranks"),
    ]
    stored = json.loads(storage.read_bytes(run.path("failures/001.json")))
    assert stored == {
        "number": 1, "at": "2025-01-02T03:04:05+00:00", "launch": "one", "by": "ranks", "kind": "killed",
        "says": "the process was killed", "rank": 1, "node": "beta", "step": None, "counts": True, "avoid": False,
    }  # fmt: skip


def test_none_is_left_with_a_limit_of_none(run, steps):
    assert Budget(run, "one", 0, now).spend(KILLED, "ranks").is_spent


def test_bad_nodes(run, steps):
    budget = Budget(run, "one", 9, now)
    assert budget.bad_nodes() == []
    budget.spend(KILLED, "ranks")
    assert budget.bad_nodes() == []  # once is chance
    budget.spend(BROKEN, "ranks")
    assert budget.bad_nodes() == ["alpha"]
    budget.spend(KILLED, "ranks")
    assert Budget(run, "one", 9, now).bad_nodes() == ["alpha", "beta"]
    assert Budget(run, "two", 9, now).bad_nodes() == []


def test_a_store_that_fails_does_not_lose_count(run, steps, monkeypatch):
    def fail(*_: object) -> None:
        raise InfrastructureError("down")

    budget = Budget(run, "one", 1, now)
    steps.newest = 10
    budget.spend(KILLED, "ranks")
    for name in ("read_failures", "latest_resumable"):
        monkeypatch.setattr(budgets, name, fail)
    monkeypatch.setattr(budgets.storage, "write_bytes", fail)
    account = budget.spend(KILLED, "ranks")
    assert (account.used, account.is_spent, account.step) == (2, True, 10)
