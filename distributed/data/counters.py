"""What became of the rows of each source: nothing is dropped without a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Counts = dict[str, dict[str, int]]
"""Source -> counter -> count. Counters: rows, tokens, supervised, truncated, split, rejected/REASON."""


def add(counts: Counts, source: str, name: str, number: int = 1) -> None:
    """Count something of a source."""
    mine = counts.setdefault(source, {})
    mine[name] = mine.get(name, 0) + number


def total(counts: Iterable[Mapping[str, Mapping[str, int]]]) -> Counts:
    """The sum over streams or ranks."""
    sums: dict[str, Counter[str]] = {}
    for one in counts:
        for source, numbers in one.items():
            sums.setdefault(source, Counter()).update(numbers)
    return {source: dict(numbers) for source, numbers in sums.items()}


def copy(counts: Mapping[str, Mapping[str, Any]]) -> Counts:
    """A copy that later counting does not change."""
    return {source: dict(numbers) for source, numbers in counts.items()}
