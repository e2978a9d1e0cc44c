"""The line between a rank and whoever watches the run: events out, a request to stop in."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, Protocol

Event = Mapping[str, Any]


class Monitor(Protocol):
    """Only rank 0's monitor is heard; every rank has one."""

    def emit(self, event: Event) -> None:
        """Something happened: `kind` is phase, step, evaluation, checkpoint or message. Must not block."""
        ...

    def stop_requested(self) -> bool:
        """Whether the run shall save and end after the current step."""
        ...


class PlainMonitor:
    """For `torchrun`: lines on standard error, and SIGINT or SIGTERM as the request to stop."""

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._stop = False

    def install_signal_handlers(self) -> None:
        """First signal: save and end. Second: end at once. Main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._stop:
            raise SystemExit(128 + number)
        self._stop = True

    def emit(self, event: Event) -> None:
        if self._speaks:
            sys.stderr.write(f"[ftlaunch] {_line(event)}\n")

    def stop_requested(self) -> bool:
        return self._stop


def _line(event: Event) -> str:
    """What happened, in words where the event has some."""
    if event["kind"] == "phase":
        return f"{event['phase']} …"
    if event["kind"] == "message":
        prefix = "" if event["level"] == "info" else f"{event['level']}: "
        return f"{prefix}{event['text']}"
    fields = " ".join(f"{key}={_short(value)}" for key, value in event.items() if key != "kind")
    return f"{event['kind']}: {fields}"


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
