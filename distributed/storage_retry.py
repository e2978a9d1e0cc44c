"""Trying again after trouble that passes."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..recipes.errors import InfrastructureError
from .storage_errors import definite_error, is_throttling, kind_of_trouble, response_headers, unreachable
from .storage_throttle import Gate, gate_of

T = TypeVar("T")

FIRST_CONTACT_ATTEMPTS = 3
"""A store that never answered this process is hardly just restarting: its address is wrong, or the network."""


class ShortReadError(OSError):
    """Fewer bytes came than were asked for; passing trouble."""


@dataclass(frozen=True)
class RetryPolicy:
    """How passing trouble is waited out: full jitter, doubling from `base_s` to `cap_s` (AWS architecture blog,
    "Exponential Backoff And Jitter"), over with `attempts` or `total_s`, whichever comes first. Waits add up to 106 s
    in the mean, so that a store that is gone for a minute is waited out. A store's own `Retry-After` is kept where it
    is longer. `sleep`, `random` and `clock` are injected so that tests need no time."""

    attempts: int = 16
    base_s: float = 0.5
    cap_s: float = 20.0
    total_s: float = 300.0
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic

    def wait_s(self, attempt: int, asked_for_s: float = 0.0) -> float:
        """Seconds before the next try, after `attempt` (from 0) failed and the store asked for so many."""
        return max(asked_for_s, self.random() * min(self.cap_s, self.base_s * float(2**attempt)))


RETRY = RetryPolicy()


def retrying(what: str, url: str, call: Callable[[], T], retry: RetryPolicy = RETRY) -> T:
    """Call, again after passing trouble.

    Raises UserError for what the user can mend, InfrastructureError when the trouble does not pass."""
    gate = gate_of(url)
    started = retry.clock()
    for attempt in range(retry.attempts):
        try:
            with gate.slot():
                answer = call()
            gate.succeeded()
            return answer
        except Exception as error:
            if definite := definite_error(url, error):
                raise definite from error
            wait_s = retry.wait_s(attempt, retry_after_s(response_headers(error), time.time()))
            spent_s = retry.clock() - started
            affordable = gate.failed(kind_of_trouble(error)) and spent_s + wait_s <= retry.total_s
            if not affordable or attempt + 1 >= _attempts(retry, gate, error):
                raise _given_up(what, url, error, attempt + 1) from error
            if is_throttling(error):
                gate.slow_down(wait_s)
            retry.sleep(wait_s)
    raise AssertionError("a retry policy has at least one attempt")


def _attempts(retry: RetryPolicy, gate: Gate, error: Exception) -> int:
    first_contact = unreachable(error) and not gate.has_answered
    return min(retry.attempts, FIRST_CONTACT_ATTEMPTS) if first_contact else retry.attempts


def _given_up(what: str, url: str, error: Exception, tries: int) -> InfrastructureError:
    remedy = unreachable(error) or "Run the same command again: it goes on where it was."
    return InfrastructureError(f"cannot {what} {url}: {type(error).__name__}: {error} (tried {tries} times). {remedy}")


def retry_after_s(headers: Mapping[str, Any], now: float) -> float:
    """Seconds that a `Retry-After` header asks for, given as seconds or as a date; 0 without one."""
    value = str(headers.get("Retry-After", headers.get("retry-after", "")))
    if value.isdecimal():
        return float(value)
    parsed = email.utils.parsedate_tz(value) if value else None
    return max(0.0, email.utils.mktime_tz(parsed) - now) if parsed else 0.0
