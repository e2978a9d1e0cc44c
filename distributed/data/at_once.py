"""Many small requests at once: looking at files is waiting for round trips."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

AT_ONCE = 32


def in_parallel(call: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """The calls' answers in order; the first error is raised."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="index") as pool:
        return list(pool.map(call, items))
