"""Looks after ranks that run: finds nodes that are gone before Ray does, and ranks that hang. See `hangs.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..distributed import storage
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import FtlaunchError
from .control import Progress
from .failure import Hangs, NodeLost
from .hangs import Look, find_hang, report
from .live_nodes import LiveNodes
from .ray_logs import logs_folder
from .stacks import look_and_end, take_stacks

EVERY_S = 1.0
"""Between looks at the ranks' progress, and at nodes of ranks that are silent."""

SILENT_S = 1.0
"""Without an answer from a rank, after which its node is asked for a connection."""

LOST_S = 5.0
"""For which a node may be silent before it is taken for lost: links that flap are back sooner, and TCP bears it. Ray
itself waits for about half a minute. Where a node's machine says that nothing listens, nothing is waited for."""

ANSWER_S = 5.0
"""For ranks to send their stacks."""

STEP_FACTOR = 5.0
"""A step may take so many times the slowest so far before anybody wonders."""

FIRST_STEPS = 2
FIRST_FACTOR = 10.0
"""The first steps compile, allocate and fill caches: nothing is known of how long that takes."""

SLOW_FACTOR = 10.0
"""A rank that is at the same place for so many times-out hangs too, even if it may only be slow."""


@dataclass(frozen=True)
class Rank:
    """Where a rank runs, and how long it has not answered."""

    node: str
    pid: int
    unanswered_s: float
    actor: Any


def patience_s(progress: Progress, timeout_s: float) -> float:
    """How long ranks may be without a sign of progress."""
    if progress.phase != "training":
        return float("inf")  # reading an index, evaluating, saving: each has a time-out of its own
    if progress.steps < FIRST_STEPS:
        return FIRST_FACTOR * timeout_s
    return max(timeout_s, STEP_FACTOR * progress.longest_step_s)


@dataclass
class Watch:
    """Of one start of the ranks after another. `progress` asks for how far they are."""

    nodes: LiveNodes
    run: RunDirectory
    timeout_s: float
    progress: Callable[[], Progress]
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _next_s: float = 0.0
    _unreachable_since: dict[str, float] = field(default_factory=dict)
    _earlier: Look | None = None
    _next_look_s: float = 0.0
    _same_since_s: float | None = None

    def begin(self) -> None:
        """Other ranks run now."""
        self._unreachable_since, self._earlier, self._same_since_s, self._next_look_s = {}, None, None, 0.0

    def look(self, ranks: Mapping[int, Rank]) -> dict[int, Exception]:
        """What is wrong with ranks that have not failed by themselves."""
        now = self.clock()
        if now < self._next_s:
            return {}
        self._next_s = now + EVERY_S
        return self._lost(ranks, now) or self._hanging(ranks, now)

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _lost(self, ranks: Mapping[int, Rank], now: float) -> dict[int, Exception]:
        silent = {rank.node for rank in ranks.values() if rank.unanswered_s >= SILENT_S}
        if not silent:
            self._unreachable_since = {}
            return {}
        lost = {key: why for key, why in self.nodes.lost().items() if key in silent}
        self._unreachable_since = {key: self._unreachable_since.get(key, now) for key in lost}
        over = {key for key, since in self._unreachable_since.items() if now - since >= LOST_S}
        return _gone(ranks, {key for key, why in lost.items() if why == "ended" or key in over})

    def ended(self, ranks: Mapping[int, Rank]) -> dict[int, Exception]:
        """Ranks on nodes that are gone for certain; asked when others tell of broken connections."""
        return _gone(ranks, {key for key, why in self.nodes.lost().items() if why == "ended"})

    # --- hangs ----------------------------------------------------------------------------------------------------

    def _hanging(self, ranks: Mapping[int, Rank], now: float) -> dict[int, Exception]:
        progress = self.progress()
        late = progress.idle_s > patience_s(progress, self.timeout_s)
        silent = any(rank.unanswered_s > self.timeout_s for rank in ranks.values())
        if not late and not silent:
            self._earlier, self._same_since_s, self._next_look_s = None, None, 0.0
            return {}
        if now < self._next_look_s:
            return {}
        look = take(ranks)
        hang = find_hang(look, self._earlier)
        self._earlier, self._next_look_s = look, now + self.timeout_s
        if hang is None:
            self._same_since_s = None
            return {}
        if not hang.certain and not self._is_over(hang.says, now):
            return {}
        where = self._write(report(look, {rank: self._see(ranks[rank]) for rank in look if look[rank] is None}))
        blamed = hang.ranks or tuple(ranks)
        return {rank: Hangs(f"it hangs: {hang.says}. Stacks of all ranks: {where}") for rank in blamed}

    def _is_over(self, says: str, now: float) -> bool:
        """Whether a rank that may only be slow has been at the same place for too long."""
        if self._same_since_s is None:
            self._same_since_s = now
            self.say(f"no step for a while: {says}")
        return now - self._same_since_s > SLOW_FACTOR * self.timeout_s

    def _see(self, rank: Rank) -> str:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(rank.node, soft=False)
        task = ray.remote(num_cpus=0)(_look_and_end).options(scheduling_strategy=place)
        try:
            return str(ray.get(task.remote(rank.pid), timeout=2 * ANSWER_S))
        except Exception as error:  # whatever it is, the ranks are to be started again
            return f"it did not answer, and its node said nothing of it: {error}"

    def _write(self, text: str) -> str:
        url = self.run.path("stacks", f"{datetime.now(UTC):%Y%m%dT%H%M%S}.txt")
        try:
            storage.write_bytes(url, text.encode())
        except FtlaunchError as error:
            return f"could not be written ({error})"
        return url


def _gone(ranks: Mapping[int, Rank], keys: set[str]) -> dict[int, Exception]:
    return {
        number: NodeLost("the node does not answer any more") for number, rank in ranks.items() if rank.node in keys
    }


def _look_and_end(pid: int) -> str:
    return look_and_end(logs_folder(), pid)


def take(ranks: Mapping[int, Rank]) -> dict[int, Sequence[Any] | None]:
    """The stacks of all ranks that answer."""
    import ray
    from ray.exceptions import RayError

    asked = {rank.actor.execute.remote(take_stacks): number for number, rank in ranks.items()}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    look: dict[int, Sequence[Any] | None] = dict.fromkeys(ranks)
    for answer in answered:
        with suppress(RayError):  # it died meanwhile, which the next poll tells
            look[asked[answer]] = ray.get(answer)
    return dict(sorted(look.items()))
