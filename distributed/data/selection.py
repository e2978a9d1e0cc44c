"""Which rows of a source are used: `skip` and `take` as ranges of rows of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .block import ALL_ROWS, UNKNOWN_ROWS
from .order import Int64s

COUNTED_AT_ONCE = 32
"""Blocks read together to be counted; the last of them may not have been needed."""


class Wanted(NamedTuple):
    """Per block [blocks]: rows as far as they are known now, rows to skip, rows to take after them (or `ALL_ROWS`)."""

    rows: Int64s
    skip: Int64s
    take: Int64s


def rows_wanted(rows: Int64s, count: Callable[[Sequence[int]], Sequence[int]], skip: int, take: int | None) -> Wanted:
    """The rows [skip, skip + take) of blocks in file order. `count(places)` reads blocks whose rows are not known; only
    as many are read as it takes to find the end of the range (without `take`: its beginning)."""
    rows = rows.copy()
    stop = skip if take is None else skip + take
    _count_up_to(rows, count, stop)
    known = np.where(rows == UNKNOWN_ROWS, 0, rows)
    before = np.concatenate([[0], np.cumsum(known)[:-1]])
    first = np.clip(skip - before, 0, known)
    last = known if take is None else np.clip(stop - before, 0, known)
    taken = np.where((first == 0) & (last == known), ALL_ROWS, last - first)
    if take is not None:
        taken = np.where(rows == UNKNOWN_ROWS, 0, taken)  # behind the end of the range
    return Wanted(rows, first.astype(np.int64), taken.astype(np.int64))


def _count_up_to(rows: Int64s, count: Callable[[Sequence[int]], Sequence[int]], stop: int) -> None:
    """Fill in unknown row counts until the rows so far reach `stop`."""
    total = at = 0
    while at < len(rows) and total < stop:
        upto = min(len(rows), at + COUNTED_AT_ONCE)
        unknown = [place for place in range(at, upto) if rows[place] == UNKNOWN_ROWS]
        rows[unknown] = count(unknown)
        total += int(rows[at:upto].sum())
        at = upto
