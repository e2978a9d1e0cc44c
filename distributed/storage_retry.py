"""Trying again after trouble that passes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..recipes.errors import InfrastructureError
from .storage_errors import definite_error

T = TypeVar("T")


class ShortReadError(OSError):
    """Fewer bytes came than were asked for; passing trouble."""


@dataclass(frozen=True)
class RetryPolicy:
    """How passing trouble is waited out: full jitter, doubling from `base_s` to `cap_s` (AWS architecture blog,
    "Exponential Backoff And Jitter"). `sleep` and `random` are injected so that tests need no time."""

    attempts: int = 6
    base_s: float = 0.5
    cap_s: float = 20.0
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random

    def wait(self, attempt: int) -> None:
        """Sleep before the next try, after `attempt` (from 0) failed."""
        self.sleep(self.random() * min(self.cap_s, self.base_s * 2**attempt))


RETRY = RetryPolicy()


def retrying(what: str, url: str, call: Callable[[], T], retry: RetryPolicy = RETRY) -> T:
    """Call, again after passing trouble.

    Raises UserError for what the user can mend, InfrastructureError when the trouble does not pass."""
    for attempt in range(retry.attempts):
        try:
            return call()
        except Exception as error:
            if definite := definite_error(url, error):
                raise definite from error
            if attempt + 1 == retry.attempts:
                raise InfrastructureError(
                    f"cannot {what} {url}: {type(error).__name__}: {error} (tried {retry.attempts} times)"
                ) from error
            retry.wait(attempt)
    raise AssertionError("a retry policy has at least one attempt")
