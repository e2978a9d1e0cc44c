"""Values that a plan cannot find out from here, with the reason instead of a guess."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..distributed import storage
from ..distributed.storage_retry import RetryPolicy
from ..recipes.errors import FtlaunchError, InfrastructureError

T = TypeVar("T")
U = TypeVar("U")

QUICK = RetryPolicy(attempts=2, base_s=0.2)
"""A plan does not wait for a store that is out of reach."""

MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Unknown:
    """A value that is not known, and why."""

    reason: str

    def __str__(self) -> str:
        return f"unknown: {self.reason}"


def ask(place: str, look: Callable[[], T], options: str = storage.NO_OPTIONS) -> T | Unknown:
    """What `look` finds at `place`, a path or URL that is reached with storage `options`.

    A remote place that cannot be reached from here may be in reach where the run will be, so it is Unknown. What is
    wrong with a place that is in reach is the user's to mend: that is raised.
    """
    if storage.is_local(place):
        return look()
    try:
        storage.exists(_before_magic(place), QUICK, options=options)
    except FtlaunchError as error:
        return Unknown(first_line(error))
    try:
        return look()
    except InfrastructureError as error:
        return Unknown(first_line(error))


def _before_magic(place: str) -> str:
    """The place itself, or the folder in which a glob begins."""
    before, *magic = MAGIC.split(place, maxsplit=1)
    return before.rpartition("/")[0] if magic else place


def first_line(error: FtlaunchError) -> str:
    """An error without its advice, to stand in a table."""
    return str(error).splitlines()[0]


def then(value: T | Unknown, use: Callable[[T], U]) -> U | Unknown:
    """`use(value)`, or the reason why there is no value."""
    return value if isinstance(value, Unknown) else use(value)
