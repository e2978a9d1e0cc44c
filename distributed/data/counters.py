"""What became of the rows of each source: nothing is dropped without a number.

Counted when a row is read: `rows`, `rejected/REASON`, `truncated`, `split`, and `lost_tokens`: of rows longer than a
sequence, those that are not trained on. Counted when a sequence is handed out: `samples`, `tokens`, `supervised`. So
the shares of tokens are of what was trained on; `rows` is ahead of them by what waits in the packing buffers, and a
run that ends with its data leaves those empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Counts = dict[str, dict[str, int]]
"""Source -> counter -> count."""


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
