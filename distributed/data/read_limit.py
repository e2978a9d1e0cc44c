"""How many reads are in flight: few to begin with, more while that is what the consumers wait for. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

FIRST_READS = 4
"""The first blocks of a stream arrive the sooner the fewer share the link."""

FEWEST_READS = 8
"""Once anybody has waited. Reads that share a link end together, and then it idles for a round trip: the more of them,
the less often. That is too small a gain to be seen in a few reads, so it isn't judged by them."""

MAX_READS = 32
"""More connections than this help no store that is known, and each holds a block."""

GAIN = 1.1
"""Throughput by which twice the reads must grow for the next doubling."""

LOSS = 0.9
"""Throughput below this share of the one before takes the doubling back."""


REST_ROUNDS = 16
"""Rounds until a doubling that did not help is tried again: stores and links change."""


class ReadLimit:
    """The number of reads in flight of one reader, `value`.

    Reads are looked at in rounds of `value`. A round in which nobody waited for a block changes nothing: what there is
    suffices. After one in which somebody did the number doubles, and the next such round shows whether that brought
    throughput (`GAIN`: on to the next doubling), nothing (it stays for `REST_ROUNDS`), or harm (`LOSS`: it is taken
    back, down to `FEWEST_READS`).
    """

    def __init__(self, first: int = FIRST_READS, most: int = MAX_READS) -> None:
        self.value = min(first, most)
        self._most = most
        self._before: float | None = None  # bytes/s at half the number
        self._rest = 0
        self._since_s: float | None = None
        self._reads, self._nbytes, self._waited = 0, 0, False

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """As many as ever, for reads that are all wanted together; what was learned before holds again afterwards."""
        before, self.value = self.value, self._most
        try:
            yield
        finally:
            self.value = before
            self._begin(None)

    def done(self, nbytes: int, now_s: float, *, waiting: bool) -> None:
        """A read of so many stored bytes has ended; `waiting`: somebody waits for a block."""
        self._waited |= waiting
        if self._since_s is None:
            self._since_s = now_s  # a round is measured from the end of one read to that of another
            return
        self._reads += 1
        self._nbytes += nbytes
        if self._reads < self.value:
            return
        if self._waited:
            self._judge(self._nbytes / max(now_s - self._since_s, 1e-9))
            self._begin(now_s)
        else:
            self._before = None
            self._begin(None)

    def _judge(self, rate: float) -> None:
        before, self._before = self._before, None
        if before is not None and rate < GAIN * before:
            self._rest = REST_ROUNDS
            if rate < LOSS * before and self.value > FEWEST_READS:
                self.value //= 2
        elif self._rest:
            self._rest -= 1
        elif self.value < self._most:
            self._before = rate
            self.value = min(self._most, 2 * self.value)

    def _begin(self, since_s: float | None) -> None:
        self._since_s = since_s
        self._reads, self._nbytes, self._waited = 0, 0, False
