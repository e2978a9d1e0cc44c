"""How far something is that counts rows or bytes, on standard error, once it takes longer than a moment."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from . import units

PATIENCE_S = 3.0
"""What is over sooner shows nothing."""

REDRAW_S = 0.5
LINE_EVERY_S = 30.0
"""Where lines cannot be drawn over."""


class Progress:
    """`update` as often as wanted: it is drawn now and then. On a terminal one line is drawn over and wiped in the end;
    elsewhere a line is written from time to time. `clock` is injected, in seconds; `amount` says what is counted."""

    def __init__(
        self,
        out: TextIO,
        *,
        drawn_over: bool,
        clock: Callable[[], float] = time.monotonic,
        amount: Callable[[int], str] = lambda rows: f"{units.count(rows)} rows",
    ) -> None:
        self._out, self._drawn_over, self._clock, self._amount = out, drawn_over, clock, amount
        self._began = clock()
        self._next = self._began + PATIENCE_S
        self._width = 0

    def update(self, what: str, number: int, share: float) -> None:
        """`number` of rows or bytes so far, `share` of the whole that is done, 0 to 1."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + (REDRAW_S if self._drawn_over else LINE_EVERY_S)
        self._write(progress_text(what, self._amount(number), share, now - self._began))

    def done(self) -> None:
        """Wipe the line."""
        if self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._out.flush()

    def _write(self, text: str) -> None:
        if self._drawn_over:
            self._out.write("\r" + text.ljust(self._width))
            self._width = max(self._width, len(text))
        else:
            self._out.write(text + "\n")
        self._out.flush()


def progress_text(what: str, amount: str, share: float, elapsed_s: float) -> str:
    """`tickets: 12.0k rows, 34%, about 2 min 10 s left`; no guess before a hundredth is done."""
    left = f", about {units.duration(elapsed_s * (1 - share) / share)} left" if share >= 0.01 else ""
    return f"{what}: {amount}, {share:.0%}{left}"


class Counted:
    """Bytes of one long reading or writing, told to a progress. `advance` may be called from several threads."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total = progress, what, max(1, total)
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, number: int) -> None:
        """So many more are done."""
        with self._lock:
            self._done += number
            self._progress.update(self._what, self._done, min(1.0, self._done / self._total))


def byte_progress() -> Progress:
    """On this process's standard error."""
    return Progress(sys.stderr, drawn_over=sys.stderr.isatty(), amount=units.size)
