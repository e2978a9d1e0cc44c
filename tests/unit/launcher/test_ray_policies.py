"""What Ray Train is told when ranks have failed, and where and how many it is to start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from ftlaunch.cluster.base import Demand
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher import ray_policies
from ftlaunch.launcher.budget import Budget, read_failures
from ftlaunch.launcher.control import Move
from ftlaunch.launcher.failure import NoRoom, Resized
from ftlaunch.launcher.live_nodes import Absence, Names, Node
from ftlaunch.launcher.ray_policies import ROOM_S, STORE_S, BudgetPolicy, LiveNodesPolicy, Place
from ftlaunch.recipes.errors import InfrastructureError

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE
BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40993")
DIED = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


class Failures:
    """A policy over two ranks, and what it has said."""

    def __init__(self, folder: str, limit: int = 2) -> None:
        self.said: list[str] = []
        self.run = RunDirectory(folder)
        hide = lambda text: text.replace("hunter2", "REDACTED")  # noqa: E731
        self.policy = BudgetPolicy(Budget(self.run, "one", limit), self.said.append, hide)
        self.policy.places = {0: Place("a", "alpha"), 1: Place("b", "beta")}

    def decide(self, *errors: BaseException) -> FailureDecision:
        failed = {rank: error for rank, error in enumerate(errors) if error is not None}
        return self.policy.make_decision(WorkerGroupError("text", failed))


@pytest.fixture
def failures(tmp_path) -> Failures:
    return Failures(str(tmp_path))


def test_a_lost_rank_is_named_and_started_again_until_the_budget_is_spent(failures):
    assert [failures.decide(BROKEN, DIED) for _ in range(3)] == [RETRY, RETRY, RAISE]
    assert failures.said[0] == (
        "rank 1 on beta: the process was killed; all ranks are started again, "
        "from the beginning: there is no checkpoint yet (restart 1 of 2)"
    )
    assert (failures.policy.verdict.kind, failures.policy.verdict.exit_code) == ("killed", 2)
    assert [(one.kind, one.node) for one in read_failures(failures.run)] == [("killed", "beta")] * 3


@pytest.mark.parametrize("error", [KeyError("hunter2"), TypeError("hunter2")])
def test_a_bug_ends_the_run_at_once(failures, error):
    assert failures.decide(BROKEN, error) == RAISE
    assert failures.policy.verdict.kind == "bug"
    assert "REDACTED" in failures.policy.verdict.says
    assert "hunter2" not in failures.policy.verdict.detail
    assert read_failures(failures.run) == []


def test_moving_costs_nothing(tmp_path):
    failures = Failures(str(tmp_path), limit=0)
    assert [failures.decide(Resized("3 nodes are there"), BROKEN) for _ in range(5)] == [RETRY] * 5
    assert failures.said[0].startswith("3 nodes are there; all ranks are started again, from the beginning")
    assert "restart" not in failures.said[0]
    assert failures.decide(DIED) == RAISE


def test_a_store_that_is_gone_is_given_time(failures, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(ray_policies.time, "monotonic", lambda: now_s[0])
    gone = InfrastructureError("cannot read s3://acme/runs/x: EndpointConnectionError: ... (tried 16 times)")
    for pause_s in (STORE_S, 2 * STORE_S):
        assert failures.decide(gone, BROKEN) == RETRY
        assert f"all ranks are started again in {pause_s:g} s" in failures.said[-1]
        now_s[0] += pause_s - 1
        assert failures.policy.is_pausing
        now_s[0] += 1
        assert not failures.policy.is_pausing
    assert failures.decide(BROKEN, DIED) == RAISE, "and no longer than the budget allows"


def test_room_is_waited_for(failures, monkeypatch):
    now = iter([100.0, 101.0, 100.0 + ROOM_S])
    monkeypatch.setattr(ray_policies.time, "monotonic", lambda: next(now))
    error = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert [failures.policy.make_decision(error) for _ in range(3)] == [RETRY, RETRY, RAISE]
    assert failures.policy.verdict.kind == "room"
    assert read_failures(failures.run) == []


# --- nodes ------------------------------------------------------------------------------------------------------------


class Cluster:
    """Nodes of two cores each, some of them lost or draining."""

    def __init__(self, keys: str) -> None:
        self.names = Names()
        self.keys, self.gone, self.going = keys, "", ""

    def listed(self) -> list[Node]:
        return [Node(key, f"node-{key}", ("127.0.0.1", 1), {"CPU": 2.0}) for key in self.keys]

    def lost(self) -> dict[str, Absence]:
        return dict.fromkeys(self.gone, "silent")

    def draining(self) -> set[str]:
        return set(self.going)


class Bed:
    """A policy of one rank of two cores a node."""

    def __init__(self, keys: str, least: int | None, most: int) -> None:
        self.cluster, self.bad, self.now_s, self.pausing = Cluster(keys), list[str](), 0.0, False
        self.said: list[str] = []
        self.moves: list[Move] = []
        demand = Demand(most, most, uses_gpus=False, cpus_per_rank=2, least_nodes=least)
        self.policy = LiveNodesPolicy(
            ScalingConfig(num_workers=most, resources_per_worker=demand.resources_per_rank),
            demand,
            self.cluster,
            choose=lambda there: min(there, most) if there >= demand.needed_nodes else None,
            bad_nodes=lambda: self.bad,
            leave=self.moves.append,
            say_waiting=self.said.append,
            grow_after_s=30.0,
            is_pausing=lambda: self.pausing,
            clock=lambda: self.now_s,
        )

    def start(self) -> int | None:
        """Ranks that are started; None: it waits."""
        decision = self.policy.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    def left_out(self) -> str | None:
        chosen = self.policy.on_controller_start_worker_group(scaling_config=None, num_workers=1)
        return next(iter(chosen.values())) if chosen else None

    def run(self, keys: str, seconds: float, started: float = 1.0) -> None:
        """Ranks run on these nodes for a while, in which they are asked for every half a second."""
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=key)) for key in keys]
        state: Any = SimpleNamespace(workers=workers, num_workers=len(workers), start_time=started)
        for _ in range(int(2 * seconds)):
            self.now_s += 0.5
            assert isinstance(self.policy.make_decision_for_running_worker_group(state, None), NoopDecision)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(ray_policies.time, "sleep", lambda _: None)


def test_ranks_go_to_nodes_that_are_there():
    bed = Bed("abc", None, 2)
    assert bed.start() == 2
    assert bed.left_out() is None
    bed.cluster.gone = "b"
    assert bed.start() == 2
    assert bed.left_out() == "!in(b)"


def test_nobody_starts_during_a_pause():
    bed = Bed("ab", None, 2)
    bed.pausing = True
    assert bed.start() is None
    bed.pausing = False
    assert bed.start() == 2


def test_a_fixed_number_is_waited_for_and_not_for_ever():
    bed = Bed("ab", None, 2)
    bed.cluster.keys = "a"
    assert bed.start() == 2  # the cluster had them a moment ago: Ray says when there is room
    assert bed.start() is None
    assert bed.said == ["waiting for nodes: 1 of 2 are there; Ctrl-C gives up"]
    bed.now_s = ROOM_S - 1
    assert bed.start() is None
    assert len(bed.said) == 1
    bed.cluster.keys = "ac"
    assert bed.start() == 2
    bed.cluster.keys = "a"
    bed.start()
    bed.now_s += ROOM_S + 1
    with pytest.raises(NoRoom, match="1 of 2 nodes were there for 15 min"):
        bed.start()


def test_a_range_goes_on_with_what_is_there():
    bed = Bed("abc", 1, 3)
    assert bed.start() == 3
    bed.cluster.gone, bed.cluster.going = "a", "b"
    assert bed.start() == 1
    assert bed.left_out() == "!in(a,b)"
    bed.cluster.gone = "ac"
    assert bed.start() is None


def test_bad_nodes_are_used_only_where_the_others_do_not_suffice():
    bed = Bed("abc", None, 2)
    bed.bad = ["node-a"]
    assert bed.start() == 2
    assert bed.left_out() == "!in(a)"
    bed.bad = ["node-a", "node-b"]
    assert bed.start() == 2
    assert bed.left_out() is None
    elastic = Bed("abc", 1, 3)
    elastic.bad = ["node-a"]
    assert elastic.start() == 2


def test_more_nodes_must_stay_for_a_while():
    bed = Bed("ab", 1, 3)
    bed.start()
    bed.run("ab", 60)
    assert bed.moves == []
    bed.cluster.keys = "abc"
    bed.run("ab", 20)
    bed.cluster.keys = "ab"
    bed.run("ab", 10)
    bed.cluster.keys = "abc"
    bed.run("ab", 25)
    assert bed.moves == []
    bed.run("ab", 15)
    [move] = bed.moves
    assert (move.kind, "3 nodes are there, 2 were used" in move.says) == ("resize", True)
    bed.run("ab", 60)
    assert len(bed.moves) == 1  # asked once
    bed.run("abc", 60, started=2.0)
    assert len(bed.moves) == 1


def test_ranks_leave_a_node_that_is_taken_away():
    bed = Bed("abcd", None, 2)
    bed.start()
    bed.cluster.going = "c"
    bed.run("ab", 5)
    assert bed.moves == []
    bed.cluster.going = "cb"
    bed.run("ab", 5)
    [move] = bed.moves
    assert move.kind == "preempted"
    assert bed.start() == 2
    assert bed.left_out() == "!in(b,c)"
