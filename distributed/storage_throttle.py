"""How hard one process presses on one store: fewer requests at once when it says "slow down", and an end to trying
again when most requests fail."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

MOST_REQUESTS = 64
"""Requests in flight at one store from one process, at most."""

RETRY_BUDGET = 1_000
"""Failures more than successes that are tried again, per store and process. A long outage ends earlier, with the tries
of a single request; this ends runs that crawl on while most requests fail."""

CALM_S = 1.0
"""One lowering in this time: refusals of requests that were in flight together say the same thing once."""


class Gate:
    """Additive increase, multiplicative decrease of the requests in flight (Chiu and Jain 1989), and a budget of
    retries. `clock` is in seconds; it and `sleep` are injected so that tests need no time."""

    def __init__(
        self,
        most: int = MOST_REQUESTS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.limit = float(most)
        """Requests that may be in flight now."""
        self.has_answered = False
        """Whether the store has ever answered this process."""
        self.counts: Counter[str] = Counter()
        """Requests that succeeded, and that failed in passing, by kind of trouble."""
        self._most = most
        self._clock = clock
        self._sleep = sleep
        self._in_flight = 0
        self._budget = RETRY_BUDGET
        self._lowered_at = -CALM_S
        self._closed_until = 0.0
        self._changed = threading.Condition()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a place, and hold it for one request."""
        self._sleep_while_closed()
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight < max(1, int(self.limit)))
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def succeeded(self) -> None:
        """A request was answered: one more may be in flight after each round of them."""
        with self._changed:
            self.has_answered = True
            self.counts["ok"] += 1
            self._budget = min(RETRY_BUDGET, self._budget + 1)
            self.limit = min(self._most, self.limit + 1 / max(1.0, self.limit))

    def failed(self, kind: str) -> bool:
        """A request failed in passing; False when the budget of retries is used up."""
        with self._changed:
            self.counts[kind] += 1
            self._budget -= 1
            return self._budget > 0

    def slow_down(self, wait_s: float) -> None:
        """The store refuses to be asked so often: half the requests, and none at all for `wait_s`."""
        with self._changed:
            now = self._clock()
            self._closed_until = max(self._closed_until, now + wait_s)
            if now - self._lowered_at >= CALM_S:
                self._lowered_at = now
                self.limit = max(1.0, self.limit / 2)

    def _sleep_while_closed(self) -> None:
        while (left := self._closed_until - self._clock()) > 0:
            self._sleep(left)


_GATES: dict[tuple[str, str], Gate] = {}
_LOCK = threading.Lock()


def gate_of(url: str) -> Gate:
    """The gate of the store that a URL lies in: a bucket, or a server."""
    parts = urlsplit(url)
    with _LOCK:
        return _GATES.setdefault((parts.scheme, parts.netloc), Gate())


def request_counts() -> Counter[str]:
    """Requests of this process to all stores: `ok`, and passing trouble by kind."""
    with _LOCK:
        return sum((gate.counts for gate in _GATES.values()), Counter())
