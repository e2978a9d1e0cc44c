"""Values that a plan cannot find out from here, with the reason instead of a guess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..distributed import storage
from ..recipes.errors import FtlaunchError

T = TypeVar("T")


@dataclass(frozen=True)
class Unknown:
    """A value that is not known, and why."""

    reason: str

    def __str__(self) -> str:
        return f"unknown: {self.reason}"


def ask(place: str, look: Callable[[], T]) -> T | Unknown:
    """What `look` finds. A mistake on this machine is the user's to mend now and is raised; what is wrong with a
    remote `place` may be right where the run will be (credentials, networks), so it is Unknown."""
    if storage.is_local(place):
        return look()
    try:
        return look()
    except FtlaunchError as error:
        return Unknown(str(error).splitlines()[0])
