"""Who sends what to whom while a part is written: pure arithmetic on ranges, equal on every rank.

Ranges are (start, stop) element offsets into a flattened tensor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from .fragments import TensorSpec
from .layout import DTYPES, num_elements

Range = tuple[int, int]
Ranges = tuple[Range, ...]

CHUNK_BYTES = 4 * 2**20
"""The unit of transport, of writing and of a checksum. With a few in flight a rank needs some 20 MiB besides what
it holds; a sampled read-back of 16 MiB still sees several."""


class Segment(NamedTuple):
    """Elements [start, stop) of a tensor come from `rank`."""

    start: int
    stop: int
    rank: int


def cover(held: Sequence[Ranges], start: int, stop: int, writer: int) -> list[Segment]:
    """Choose one rank for each element of [start, stop), ascending: the writer itself where it can, then the next ranks
    after it, so that replicas of different writers share the work. Raises ValueError for elements that nobody holds."""
    gaps: list[Range] = [(start, stop)] if start < stop else []
    segments: list[Segment] = []
    for step in range(len(held)):
        if not gaps:
            break
        rank = (writer + step) % len(held)
        if held[rank]:
            taken = [piece for gap in gaps for piece in intersect(held[rank], *gap)]
            segments.extend(Segment(low, high, rank) for low, high in taken)
            gaps = [rest for gap in gaps for rest in _without(gap, taken)]
    if gaps:
        raise ValueError(f"no rank holds elements {gaps[0][0]} to {gaps[0][1]}")
    return sorted(segments)


def deal(held: Sequence[Ranges], spec: TensorSpec, load: list[int]) -> list[Segment]:
    """Choose one rank for each element, ascending: what several hold goes, chunk by chunk, to the one of them with the
    fewest bytes so far. `load`: bytes by rank, which is added to. Raises ValueError for elements that nobody holds."""
    numel, size = num_elements(spec), DTYPES[spec.dtype].itemsize
    cuts = sorted({0, numel, *(place for ranges in held for piece in ranges for place in piece)})
    segments: list[Segment] = []
    for start, stop in pairwise(cuts):
        holders = [rank for rank, ranges in enumerate(held) if any(intersect(ranges, start, stop))]
        if not holders:
            raise ValueError(f"no rank holds elements {start} to {stop}")
        for low, high in [(start, stop)] if len(holders) == 1 else _on_grid(start, stop, CHUNK_BYTES // size):
            rank = min(holders, key=load.__getitem__)
            load[rank] += (high - low) * size
            if low > start and segments[-1].rank == rank:  # a segment lies in one of the rank's ranges
                segments[-1] = segments[-1]._replace(stop=high)
            else:
                segments.append(Segment(low, high, rank))
    return segments


def _on_grid(start: int, stop: int, step: int) -> Iterator[Range]:
    """[start, stop) cut at the multiples of `step`."""
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        yield start, end
        start = end


def intersect(ranges: Sequence[Range], start: int, stop: int) -> Iterator[Range]:
    """The parts of ascending, disjoint `ranges` that lie in [start, stop)."""
    first = max(0, bisect_right(ranges, (start, start)) - 1)
    for low, high in ranges[first:]:
        if low >= stop:
            return
        if max(low, start) < min(high, stop):
            yield max(low, start), min(high, stop)


def _without(gap: Range, taken: Sequence[Range]) -> Iterator[Range]:
    position, end = gap
    for low, high in taken:
        if low >= end or high <= gap[0]:
            continue
        if position < low:
            yield position, low
        position = high
    if position < end:
        yield position, end


def chunks(spec: TensorSpec, chunk_bytes: int) -> Iterator[Range]:
    """A tensor in pieces of at most `chunk_bytes`; none for an empty tensor."""
    numel = num_elements(spec)
    step = max(1, chunk_bytes // DTYPES[spec.dtype].itemsize)
    return ((start, min(start + step, numel)) for start in range(0, numel, step))


def clip(segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    """The segments, which tile a tensor, cut to [start, stop)."""
    first = bisect_right(segments, start, key=lambda segment: segment.start) - 1
    clipped = []
    for low, high, rank in segments[first:]:
        if low >= stop:
            break
        clipped.append(Segment(max(low, start), min(high, stop), rank))
    return clipped
