"""What Ray Train asks when ranks have failed, and when it wants to start them: whether, on which nodes, how many.

Ray Train's own policies retry a bug as often as a lost machine, know no nodes, and believe Ray's view of the cluster,
which is up to a minute old.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from ..cluster.base import Demand
from .budget import Budget
from .control import Move
from .failure import Failure, NoRoom, Trouble, cause, classify
from .live_nodes import LiveNodes, Node

Say = Callable[[str], None]

ROOM_S = 900.0
"""For nodes to come, or other runs to make room; Ray's own way is to wait for ever."""

WAIT_S = 0.5
"""Between looks at the cluster while there are too few nodes."""

LOOK_S = 1.0
"""Between looks at nodes that are taken away while ranks run."""

STORE_S = 20.0
"""Before ranks are started again on a store that did not answer, doubled from time to time: one that is gone for
minutes must not use up the restarts within seconds."""

GROW_LOOK_S = 5.0
"""Between looks for more of them, where a run would use more than it has."""


@dataclass(frozen=True)
class Place:
    """The node of a rank: Ray's id of it, and its name."""

    key: str
    name: str


def troubles_of(error: TrainingFailedError) -> dict[int | None, Trouble]:
    """What Ray Train tells, by rank; None: of no single one."""
    if isinstance(error, WorkerGroupError):
        return {rank: trouble_of(one) for rank, one in error.worker_failures.items()}
    if isinstance(error, ControllerError):
        return {None: trouble_of(error.controller_failure)}
    return {None: trouble_of(error)}


def trouble_of(error: BaseException) -> Trouble:
    """An exception in words, without Ray's wrapping."""
    inner = getattr(error, "health_check_failure", None)
    return trouble_of(inner) if isinstance(inner, Exception) else Trouble(type(error).__name__, str(error))


class BudgetPolicy(FailurePolicy):  # type: ignore[misc]
    """Says what happened, and starts ranks again as long as that is worth it and the run's budget has room."""

    def __init__(self, budget: Budget, say: Say, hide: Callable[[str], str]) -> None:
        super().__init__(FailureConfig())
        self.places: Mapping[int, Place] = {}
        """Of the ranks that run; kept up to date by the controller."""
        self.verdict: Failure | None = None
        """With what the run ended."""
        self._budget, self._say, self._hide = budget, say, hide
        self._waiting_since: float | None = None
        self._store_back_s = 0.0

    @property
    def is_pausing(self) -> bool:
        """Whether ranks are not to be started just yet."""
        return time.monotonic() < self._store_back_s

    def judge(self, errors: Mapping[int, BaseException]) -> Failure:
        """What ranks died of."""
        return self._classify({rank: trouble_of(error) for rank, error in errors.items()})

    def _classify(self, troubles: Mapping[int | None, Trouble]) -> Failure:
        found = {}
        for rank, trouble in troubles.items():
            place = None if rank is None else self.places.get(rank)
            hidden = Trouble(trouble.type, self._hide(trouble.text))
            found[-1 if rank is None else rank] = classify(hidden, rank, place.name if place else None)
        return cause(found)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        error = training_failed_error
        if isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            return self._wait()
        self._waiting_since = None
        failure = self._classify(troubles_of(error))
        if failure.response == "stop":
            return self._end(failure)
        account = self._budget.spend(failure, "ranks")
        if failure.counts and account.is_spent:
            return self._end(failure)
        count = f" (restart {account.used} of {account.limit})" if failure.counts else ""
        pause = ""
        if failure.kind == "storage":
            pause_s = STORE_S * 2 ** (account.used - 1)
            self._store_back_s, pause = time.monotonic() + pause_s, f" in {pause_s:g} s"
        self._say(f"{failure}; all ranks are started again{pause}, {account.where}{count}")
        return FailureDecision.RETRY

    def _wait(self) -> FailureDecision:
        """Nodes are there and taken by somebody else, or one has just gone."""
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        if now - self._waiting_since < ROOM_S:
            return FailureDecision.RETRY
        return self._end(classify(Trouble("NoRoom", f"the cluster had no room for the ranks for {ROOM_S / 60:g} min")))

    def _end(self, failure: Failure) -> FailureDecision:
        self.verdict = failure
        return FailureDecision.RAISE


class LiveNodesPolicy(ScalingPolicy):  # type: ignore[misc]
    """Ranks go to nodes that are there. `choose`: so many nodes are there -> so many to use; None: too few. `leave`
    asks the ranks to save and leave."""

    def __init__(
        self,
        scaling_config: ScalingConfig,
        demand: Demand,
        nodes: LiveNodes,
        choose: Callable[[int], int | None],
        bad_nodes: Callable[[], list[str]],
        leave: Callable[[Move], None],
        say_waiting: Say,
        grow_after_s: float,
        is_pausing: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(scaling_config)
        self._demand, self._nodes, self._choose, self._bad_nodes = demand, nodes, choose, bad_nodes
        self._leave, self._say_waiting, self._grow_after_s, self._clock = leave, say_waiting, grow_after_s, clock
        self._is_pausing = is_pausing
        self._has_started = False
        self._waiting_since: float | None = None
        self._left_out: list[str] = []
        self._next_look_s = self._next_grow_look_s = 0.0
        self._more_since: float | None = None
        self._asked: float | None = None

    # No request to an autoscaler.
    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _get_num_workers_for_resource_request(self) -> int:
        return self._demand.ranks

    # --- starting -------------------------------------------------------------------------------------------------

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if self._is_pausing():
            time.sleep(WAIT_S)
            return NoopDecision()
        fit = self._fit()
        count = self._choose(len(fit))
        if count is None and not self._has_started:
            count = self._demand.needed_nodes  # the cluster was asked before: others have the room, for a while
        if count is None:
            return self._wait_for_nodes(len(fit))
        self._has_started, self._waiting_since = True, None
        return ResizeDecision(count * self._demand.ranks_per_node, self.scaling_config._resources_per_worker_not_none)

    def _wait_for_nodes(self, there: int) -> ScalingDecision:
        now = self._clock()
        if self._waiting_since is None:
            self._waiting_since = now
            self._say_waiting(f"waiting for nodes: {there} of {self._demand.needed_nodes} are there; Ctrl-C gives up")
        if now - self._waiting_since > ROOM_S:
            raise NoRoom(f"{there} of {self._demand.needed_nodes} nodes were there for {ROOM_S / 60:g} min")
        time.sleep(WAIT_S)
        return NoopDecision()

    def _fit(self) -> list[Node]:
        """Places for the ranks of a node, each as the node that it is on. Bad nodes are among them only where the
        others do not suffice."""
        listed, draining = self._nodes.listed(), self._nodes.draining()
        lost = self._nodes.lost()
        there = [node for node in listed if node.key not in lost and node.key not in draining]
        bad = set(self._bad_nodes())
        good = [node for node in there if node.name not in bad]
        chosen = good if self._choose(len(self._places(good))) is not None else there
        self._left_out = sorted({node.key for node in listed} - {node.key for node in chosen})
        return self._places(chosen)

    def _places(self, nodes: list[Node]) -> list[Node]:
        each, ranks = self._demand.resources_per_rank, self._demand.ranks_per_node
        return [node for node in nodes for _ in range(node.room(each) // ranks)]

    def on_controller_start_worker_group(self, **_settings: Any) -> dict[str, str] | None:
        """Where Ray is to place ranks: on none of the nodes that are left out."""
        return {RAY_NODE_ID_KEY: f"!in({','.join(self._left_out)})"} if self._left_out else None

    # --- while ranks run ------------------------------------------------------------------------------------------

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Never a resize at once, which would throw away what was trained since the last checkpoint: ranks are asked to
        save and leave first."""
        now, started = self._clock(), worker_group_state.start_time
        if now < self._next_look_s or self._asked == started:
            return NoopDecision()
        self._next_look_s = now + LOOK_S
        draining = self._nodes.draining()
        going = {worker.metadata.node_id for worker in worker_group_state.workers} & draining
        if going:
            names = ", ".join(sorted(self._nodes.names[key] for key in going))
            self._ask(started, Move("preempted", f"{names} is about to be taken away: the ranks have saved and left"))
        elif worker_group_state.num_workers < self._demand.ranks and now >= self._next_grow_look_s:
            self._next_grow_look_s = now + GROW_LOOK_S
            self._look_for_more(worker_group_state.num_workers // self._demand.ranks_per_node, started, now)
        return NoopDecision()

    def _look_for_more(self, used: int, started: float, now: float) -> None:
        more = self._choose(len(self._fit()))
        if more is None or more <= used:
            self._more_since = None
            return
        self._more_since = self._more_since or now
        if now - self._more_since >= self._grow_after_s:
            self._more_since = None
            says = f"{more} nodes are there, {used} were used: the ranks have saved, and go on on all of them"
            self._ask(started, Move("resize", says))

    def _ask(self, started: float, move: Move) -> None:
        self._asked = started
        self._leave(move)
