"""Where a run's time went: training, and everything that kept it from training. Pure.

Every second from the first submission (or start) to the end belongs to exactly one part, so the parts add up to the
whole. What is measured while ranks train is taken from their lines; what no line tells of is told from the moments at
which attempts began and ended.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise

from ..record import Line, split

PARTS = {
    "training": "steps that count, without what is below",
    "waiting": "submitted, until the run was started on its nodes",
    "start-up": "until ranks were ready to train: imports, index, model, checks",
    "data": "ranks waited for data",
    "evaluation": "held-out losses were measured",
    "saving": "training was held up by a save",
    "lost work": "steps, evaluations and saves that were done again after a failure",
    "down": "after a failure, until ranks were started again",
    "other": "between steps, and endings",
}
"""What each part means, in the order in which they are shown."""

MOMENT_S = 1.0
"""To which the times of failures are kept."""

ENDED_WELL = frozenset({"finished", "interrupted"})


@dataclass(frozen=True)
class Life:
    """One attempt, in seconds since 1970. `ended`: as it said itself; else its last sign of life, or now if it lives.
    `outcome`: its own word; None: it was killed; "alive"."""

    number: int
    began: float
    ended: float
    outcome: str | None


@dataclass(frozen=True)
class Wait:
    """One submission, in seconds since 1970: until the run was started on its nodes."""

    submitted: float
    began: float


@dataclass(frozen=True)
class Ledger:
    """`seconds` of every part of `PARTS`. `paused_s`: the user had stopped the run; no part of the whole."""

    seconds: Mapping[str, float]
    paused_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All parts together."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the whole in which the run came forward; 0 for a run that has no time yet."""
        return self.seconds["training"] / self.total_s if self.total_s > 0 else 0.0

    def losses(self) -> list[tuple[str, float]]:
        """The parts that are not training, the largest first, without those that took no time."""
        lost = [(part, seconds) for part, seconds in self.seconds.items() if part != "training" and seconds > 0]
        return sorted(lost, key=lambda each: -each[1])


def make_ledger(
    lives: Sequence[Life],
    waits: Sequence[Wait],
    metrics: Iterable[Line],
    events: Iterable[Line],
    failures: Sequence[float] = (),
) -> Ledger:
    """The ledger of attempts, the oldest first, from what they wrote down; `failures`: when something was met by
    starting the run again, in seconds since 1970."""
    ready, (kept, taken_back) = _ready_times(events), split(metrics)
    counted, lost = _by_attempt(kept), _by_attempt(taken_back)
    spent: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
    lived: list[Life] = []
    for life in lives:
        begun = replace(life, began=max(life.began, lived[-1].ended)) if lived else life
        parts = _parts(begun, ready.get(life.number), counted[life.number], lost[life.number])
        spent.update(parts)
        lived.append(replace(begun, ended=begun.began + sum(parts.values())))
    paused_s = 0.0
    for before, after in pairwise([None, *lived]):
        assert after is not None, "only the first has none before it"
        gap = _gap(before, after, waits, failures)
        paused_s += gap.pop("paused", 0.0)
        spent.update(gap)
    return Ledger(dict(spent), paused_s)


def _ready_times(events: Iterable[Line]) -> dict[int, float]:
    """When each attempt was first ready to train."""
    ready: dict[int, float] = {}
    for event in events:
        if event.get("event") == "phase" and event.get("phase") == "training":
            ready.setdefault(int(event["attempt"]), datetime.fromisoformat(str(event["time"])).timestamp())
    return ready


def _by_attempt(lines: Iterable[Line]) -> defaultdict[int, list[Line]]:
    found: defaultdict[int, list[Line]] = defaultdict(list)
    for line in lines:
        found[int(line["attempt"])].append(line)
    return found


def _parts(life: Life, ready: float | None, counted: Sequence[Line], lost: Sequence[Line]) -> dict[str, float]:
    """Of one attempt. The clock that measures steps is not the one that tells moments, and the last sign of a run that
    was killed may be older than its last line: what was measured is never cut short."""
    whole = max(0.0, life.ended - life.began)
    start_up = whole if ready is None else min(max(0.0, ready - life.began), whole)
    waited = _sum(counted, "step", "data_wait_s")
    parts = {
        "start-up": start_up,
        "training": _sum(counted, "step", "step_s") - waited,
        "data": waited,
        "evaluation": _sum(counted, "evaluation", "seconds"),
        "saving": _sum(counted, "checkpoint", "save_stall_s"),
        "lost work": _sum(lost, "step", "step_s") + _sum(lost, "evaluation", "seconds")
        + _sum(lost, "checkpoint", "save_stall_s"),
    }  # fmt: skip
    rest = max(0.0, whole - sum(parts.values()))
    # Of an attempt that failed, the rest is the step or the save that it was at.
    broken = life.outcome not in ENDED_WELL and life.outcome != "alive"
    parts["other"] = 0.0 if broken else rest
    parts["lost work"] += rest if broken else 0.0
    return parts


def _sum(lines: Sequence[Line], kind: str, key: str) -> float:
    return sum(float(line.get(key, 0.0)) for line in lines if line["kind"] == kind)


def _gap(before: Life | None, after: Life, waits: Sequence[Wait], failures: Sequence[float]) -> dict[str, float]:
    """What happened between two attempts, or before the first."""
    since = float("-inf") if before is None else before.ended
    wait = next((wait for wait in reversed(waits) if since <= wait.began <= after.began), None)
    if wait is None:
        if before is None:
            return {}
        idle = after.began - before.ended
        if any(before.ended - MOMENT_S <= failure <= after.began for failure in failures):
            return {"down": idle}  # it had saved and left, to be started again by itself: on other nodes, say
        # A cluster that ends a run and starts it again by itself (preemption) has it wait, and nobody has paused it.
        again = "waiting" if waits and before.outcome == "interrupted" and waits[-1].began <= since else "paused"
        return {again if before.outcome in ENDED_WELL else "down": idle}
    submitted = max(wait.submitted, since)
    found = {"waiting": wait.began - submitted, "start-up": after.began - wait.began}
    if before is not None:
        found["paused" if before.outcome in ENDED_WELL else "down"] = submitted - before.ended
    return found
