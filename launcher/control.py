"""The line between a run's rank 0 and the launcher: events go one way, a request to stop the other.

`Control` lives in a Ray actor of its own, so that neither side ever waits for the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


class Control:
    """The actor's state."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._stop = False
        self._ending: Ending | None = None
        self._starts = 0

    def begin(self) -> None:
        """The ranks start. If not for the first time, whoever watches is told why nothing happened for a while."""
        self._starts += 1
        if self._starts > 1:
            text = f"a rank was lost: all are started again (start {self._starts}), from the newest checkpoint"
            self.emit({"kind": "message", "level": "warning", "text": text})

    def emit(self, event: Event) -> bool:
        """Take an event; answers whether the run shall stop."""
        self._events.append(event)
        return self._stop

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
