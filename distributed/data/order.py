"""The order in which rows are served: pure functions of (blocks, seed, epoch, stream). Final; runs depend on it.

A *lane* is a set of blocks served as one sequence of epochs: all sources together, or one lane per weighted source.
In each epoch a lane's blocks are permuted, laid end to end by bytes, and cut into `streams` segments of equal bytes.
A segment is a list of *slices* (block, lo, hi) in the block's byte space; a slice of a block of n rows and b bytes
holds the rows [ceil(lo n / b), ceil(hi n / b)), so every row is in exactly one segment, whatever the format. Rows
are shuffled within *windows* of consecutive slices. A position is (epoch, slice at which the window starts, offset in
the window's shuffled rows); nothing else is needed to go on.

No row of a window can be served before all of it is read. So in a lane's first epoch windows begin with one slice, grow
with what lies behind them, and shrink again with what lies before them: a run begins after one block per stream, and
one that a link holds up does not get half of its rows with the last byte. The price is that the rows at both ends of
the first epoch are shuffled among fewer others; blocks are permuted all the same, and every step mixes all streams.
Later epochs have full windows from the start, because those are read while the epoch before is still being served.

Stream s reads segment (s + epoch) mod streams: where blocks are few, the cuts are the same in every epoch, and
without the rotation a stream whose segment holds few or no rows would do so for ever.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

ROUNDS = 8
"""Feistel rounds; 4 make a pseudo-random permutation (Luby & Rackoff 1988), small domains want more."""

WINDOW_BYTES = 8 * 2**20
"""Stored bytes whose rows are shuffled together (at least one slice), less at the ends of the first epoch."""

MAX_DOMAIN = 2**62
_MASK64 = 2**64 - 1


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from a seed and what it is for; blake2b, so that keys of different purposes are independent."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(values: UInt64s) -> UInt64s:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), on arrays; uint64 arithmetic wraps by design."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=256)
def _round_keys(key: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(derive_key(key, "round", number)) for number in range(ROUNDS))


def permute(indices: npt.ArrayLike, size: int, key: int) -> Int64s:
    """Where a keyed permutation of range(size) sends these indices; O(1) each, no table.

    A balanced Feistel network on the smallest even number of bits that holds `size`, walking the cycle until the
    value is below `size`: Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (generalised-Feistel and
    cycle-walking constructions). The domain is under 4 x size, so a walk takes under 4 steps on average.
    """
    assert 0 < size <= MAX_DOMAIN
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    values = np.atleast_1d(np.asarray(indices, dtype=np.uint64)).copy()
    pending = np.arange(len(values))
    while len(pending):
        values[pending] = _feistel(values[pending], half, _round_keys(key))
        pending = pending[values[pending] >= np.uint64(size)]
    return values.astype(np.int64)


def _feistel(values: UInt64s, half: np.uint64, keys: Sequence[np.uint64]) -> UInt64s:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


class Slice(NamedTuple):
    """Bytes [lo, hi) of a block's byte space. `block` counts within the lane."""

    block: int
    lo: int
    hi: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.hi - self.lo


def slice_rows(piece: Slice, block_bytes: int, block_rows: int) -> range:
    """The rows of a slice, once the block's row count is known."""
    first = -(-piece.lo * block_rows // block_bytes)
    last = -(-piece.hi * block_rows // block_bytes)
    return range(first, last)


class Segment:
    """The slices of one stream in one epoch of a lane. Slice i is found in O(1); bytes before it too."""

    def __init__(self, blocks: Int64s, block_bytes: Int64s, begin: int, start: int, stop: int, *, tapers: bool) -> None:
        """`blocks`: in served order, those that overlap [start, stop); `begin`: where the first of them begins;
        `tapers`: windows are small at both ends."""
        self._blocks = blocks
        self._begins = begin + np.concatenate([[0], np.cumsum(block_bytes)]).astype(np.int64)
        self._start = start
        self._stop = stop
        self._tapers = tapers

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all slices."""
        return self._stop - self._start

    def __getitem__(self, number: int) -> Slice:
        begin, end = int(self._begins[number]), int(self._begins[number + 1])
        return Slice(int(self._blocks[number]), max(begin, self._start) - begin, min(end, self._stop) - begin)

    def bytes_before(self, number: int) -> int:
        """Bytes of the slices before this one."""
        return min(max(int(self._begins[number]), self._start), self._stop) - self._start

    def window(self, first: int) -> list[Slice]:
        """Consecutive slices from `first` on, until they hold what a window that starts there should."""
        slices: list[Slice] = []
        total, enough = 0, self._window_bytes(first)
        while first + len(slices) < len(self) and (not slices or total < enough):
            slices.append(self[first + len(slices)])
            total += slices[-1].nbytes
        return slices

    def windows(self, first: int) -> Iterator[list[Slice]]:
        """All windows from the one on that starts at `first`."""
        while first < len(self):
            yield (window := self.window(first))
            first += len(window)

    def _window_bytes(self, first: int) -> int:
        before = self.bytes_before(first)
        return min(WINDOW_BYTES, before, (self.nbytes - before) // 2) if self._tapers else WINDOW_BYTES


class LaneOrder:
    """The order of one lane."""

    def __init__(self, name: str, block_bytes: Int64s, *, streams: int, seed: int, shuffle: bool) -> None:
        """`block_bytes` [blocks], each at least 1; `name` makes the keys of lanes differ."""
        self.name = name
        self.streams = streams
        self.nbytes = int(block_bytes.sum())
        self.mean_block_bytes = self.nbytes // max(1, len(block_bytes))
        self._block_bytes = block_bytes
        self._seed = seed
        self._shuffle = shuffle
        self._layouts: dict[int, tuple[Int64s, Int64s]] = {}
        self._lock = threading.Lock()  # the streams of a rank share a lane's order

    def block_bytes(self, block: int) -> int:
        """Bytes of a block."""
        return int(self._block_bytes[block])

    def segment_bytes(self, stream: int, epoch: int) -> int:
        """Bytes of the segment that a stream reads in an epoch."""
        start, stop = self._bounds(stream, epoch)
        return stop - start

    def segment(self, stream: int, epoch: int) -> Segment:
        """What a stream reads in an epoch."""
        order, ends = self._layout(epoch)
        start, stop = self._bounds(stream, epoch)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left")) + 1 if stop > start else first
        blocks = order[first:last]
        begin = int(ends[first - 1]) if first else 0
        return Segment(blocks, self._block_bytes[blocks], begin, start, stop, tapers=epoch == 0)

    def window_order(self, stream: int, epoch: int, first_slice: int, rows: int) -> Int64s:
        """The order in which the `rows` rows of a window are served."""
        if not self._shuffle or rows == 0:
            return np.arange(rows, dtype=np.int64)
        key = derive_key(self._seed, "window", self.name, epoch, self._number(stream, epoch), first_slice)
        return permute(np.arange(rows), rows, key)

    def _number(self, stream: int, epoch: int) -> int:
        return (stream + epoch) % self.streams

    def _bounds(self, stream: int, epoch: int) -> tuple[int, int]:
        number = self._number(stream, epoch)
        return number * self.nbytes // self.streams, (number + 1) * self.nbytes // self.streams

    def _layout(self, epoch: int) -> tuple[Int64s, Int64s]:
        """Blocks in served order and where each one ends, in bytes. Three epochs are kept: streams drift apart, and
        read ahead."""
        with self._lock:
            if epoch not in self._layouts:
                while len(self._layouts) > 2:
                    del self._layouts[next(iter(self._layouts))]
                self._layouts[epoch] = self._lay_out(epoch)
            return self._layouts[epoch]

    def _lay_out(self, epoch: int) -> tuple[Int64s, Int64s]:
        order = np.arange(len(self._block_bytes), dtype=np.int64)
        if self._shuffle:
            order = permute(order, len(order), derive_key(self._seed, "blocks", self.name, epoch))
        return order, np.cumsum(self._block_bytes[order])


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The same proportions as exact integers: 0.1 means one tenth, not the nearest double."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    return tuple(weight // divisor for weight in whole)


def next_lane(weights: Sequence[int], draws: Sequence[int]) -> int:
    """Which lane serves the next draw, given how often each one has served; exact integers.

    Tijdeman 1980, "The chairman assignment problem" (Discrete Mathematics 32): among the lanes whose share of the
    draws so far exceeds what they served by at least 1/(2k-2), the one that will be overdue first. Every lane stays
    within 1 - 1/(2k-2) draws of its share, the best possible bound.
    """
    if len(weights) == 1:
        return 0
    total, number, factor = sum(weights), sum(draws) + 1, 2 * len(weights) - 2
    surplus = [factor * (weight * number - drawn * total) for weight, drawn in zip(weights, draws, strict=True)]
    due = [lane for lane, value in enumerate(surplus) if value >= total]
    return min(due, key=lambda lane: (Fraction((factor - 1) * total - surplus[lane], weights[lane]), lane))
