"""Rows that nothing could be learned from: the counters say how many, this says which, for people to look at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..recipes.methods.base import Rejected, RowId
from .checkpoint.peers import Peers

NAMED = 20
"""Rows that are named between two saves; whoever needs all of them runs `ftlaunch check`."""


@dataclass
class Rejections:
    """Some refused rows of this rank since they were last taken."""

    rows: list[str] = field(default_factory=list)

    def note(self, refused: Iterable[tuple[RowId, Rejected]]) -> None:
        """Remember rows, as far as there is room."""
        for row, rejected in refused:
            if len(self.rows) < NAMED:
                self.rows.append(f"{row}: {rejected.reason}" + (f" ({rejected.detail})" if rejected.detail else ""))

    def take(self, peers: Peers) -> list[str]:
        """Some rows of all ranks, and forget them; collective."""
        rows = [row for rank in peers.gather(self.rows) for row in rank]
        self.rows.clear()
        return rows[:NAMED]
