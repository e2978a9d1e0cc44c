"""The line between a run's rank 0 and the launcher: events go one way, requests to stop or to move the other.

`Control` lives in a Ray actor of its own, so that neither side ever waits for the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Event = Mapping[str, Any]

STEP_EVENTS_PER_S = 10.0
"""More than a person can read; steps of a few milliseconds must not pay for being watched."""

KEPT_EVENTS = 10_000


@dataclass(frozen=True)
class Ending:
    """How the training ended."""

    outcome: str
    message: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Progress:
    """How far this start of the ranks is. `idle_s`: since they last said anything; `steps`: how many were told of."""

    phase: str = "starting"
    idle_s: float = 0.0
    steps: int = 0
    longest_step_s: float = 0.0


@dataclass(frozen=True)
class Move:
    """Why ranks are asked to save and leave, to be started again on other nodes."""

    kind: Literal["resize", "preempted"]
    says: str


class Control:
    """The actor's state. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._stop = False
        self._ending: Ending | None = None
        self._clock = clock
        self._progress = Progress()
        self._spoken_s = clock()
        self._move: Move | None = None
        self._noticed: set[str] = set()

    def begin(self) -> None:
        """The ranks start."""
        self._progress, self._move, self._spoken_s = Progress(), None, self._clock()

    def emit(self, event: Event) -> bool:
        """Take an event; answers whether the ranks shall save and leave."""
        self._events.append(event)
        self._spoken_s = self._clock()
        if event["kind"] == "phase":
            self._progress = replace(self._progress, phase=event["phase"])
        elif event["kind"] == "step":
            longest = max(self._progress.longest_step_s, event["step_s"])
            self._progress = replace(self._progress, steps=self._progress.steps + 1, longest_step_s=longest)
        return self._stop or self._move is not None

    def tell(self, event: Event) -> None:
        """Something of the launcher's own, for whoever watches."""
        self._events.append(event)

    def progress(self) -> Progress:
        """How far the ranks are."""
        return replace(self._progress, idle_s=self._clock() - self._spoken_s)

    def notice(self, node: str) -> None:
        """A node, by Ray's id, is about to be taken away."""
        self._noticed.add(node)

    def noticed(self) -> set[str]:
        """Those nodes."""
        return self._noticed

    def request_move(self, move: Move) -> None:
        """Save and leave after the current step, to be started again."""
        self._move = move

    def why_leave(self) -> Move | None:
        """Why ranks that were interrupted are to be started again; None: they are not, the run was asked to stop."""
        return None if self._stop else self._move

    def take(self) -> tuple[list[Event], Ending | None]:
        """The events since the last call, and how it ended if it has."""
        events = list(self._events)
        self._events.clear()
        return events, self._ending

    def request_stop(self) -> None:
        """Save and end after the current step."""
        self._stop = True

    def end(self, ending: Ending, rank: int = 0) -> None:
        """The training is over. Rank 0's word counts; another's until then: a mistake that it alone saw."""
        if rank == 0 or self._ending is None:
            self._ending = ending


class RayMonitor:
    """`distributed.monitor.Monitor` over an actor handle; never waits for an answer."""

    def __init__(self, control: Any, *, speaks: bool) -> None:
        self._control, self._speaks = control, speaks
        self._answers: deque[Any] = deque()
        self._stop = False
        self._last_step_s = 0.0

    def emit(self, event: Event) -> None:
        if self._speaks and not self._is_too_soon(event):
            self._answers.append(self._control.emit.remote(dict(event)))

    def _is_too_soon(self, event: Event) -> bool:
        if event["kind"] != "step":
            return False
        now = time.monotonic()
        if now - self._last_step_s < 1 / STEP_EVENTS_PER_S:
            return True
        self._last_step_s = now
        return False

    def stop_requested(self) -> bool:
        """The latest answer that has arrived."""
        import ray

        while self._answers:
            ready, _ = ray.wait([self._answers[0]], timeout=0)
            if not ready:
                break
            self._stop = ray.get(self._answers.popleft()) or self._stop
        return self._stop
