"""How far a check is, on standard error, once it takes longer than a moment."""

from __future__ import annotations

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
    elsewhere a line is written from time to time. `clock` is injected, in seconds."""

    def __init__(self, out: TextIO, *, drawn_over: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._drawn_over, self._clock = out, drawn_over, clock
        self._began = clock()
        self._next = self._began + PATIENCE_S
        self._width = 0

    def update(self, what: str, rows: int, share: float) -> None:
        """`share` of the whole check that is done, 0 to 1."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + (REDRAW_S if self._drawn_over else LINE_EVERY_S)
        self._write(progress_text(what, rows, share, now - self._began))

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


def progress_text(what: str, rows: int, share: float, elapsed_s: float) -> str:
    """`tickets: 12.0k rows, 34%, about 2 min 10 s left`; no guess before a hundredth is done."""
    left = f", about {units.duration(elapsed_s * (1 - share) / share)} left" if share >= 0.01 else ""
    return f"{what}: {units.count(rows)} rows, {share:.0%}{left}"
