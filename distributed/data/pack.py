"""Fitting samples into sequences: splitting, truncating, and packing several into one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ...recipes.errors import UserError
from ...recipes.methods.base import Rejected, RowId, Sample
from ...recipes.schema import Overlong, RowFormat

OVERLONG = Rejected("overlong", "longer than data.sequence_length")
NO_TARGETS = Rejected("no_targets", "no supervised token")
NO_TARGETS_LEFT = Rejected("no_targets_after_truncation", "every supervised token was cut off")

Unit = tuple[Sample, ...]
"""Samples that must share a sequence: one as a rule, the two of a preference pair, all of a prepared sequence."""


class Address(NamedTuple):
    """Where a unit comes from: enough to read and encode it again. `stop` 0: all that its row gives; otherwise the
    tokens [start, stop) of the row's one sample."""

    block: int
    row: int
    start: int = 0
    stop: int = 0

    def saved(self) -> list[int]:
        """As JSON has it; most units are whole."""
        return list(self) if self.stop else [self.block, self.row]


class Waiting(NamedTuple):
    """A unit in the packing buffer."""

    samples: Unit
    address: Address
    length: int
    """Tokens of the unit."""
    saved: Sequence[int] = ()
    """Its address as JSON has it, made once: it is in the state of every step while the unit waits."""


def policy(overlong: Overlong | None, row_format: RowFormat) -> Overlong:
    """What becomes of long rows: as the recipe says; otherwise text is split, and the rest dropped, because half an
    answer would teach the wrong thing."""
    return overlong or ("split" if row_format == "text" else "drop")


def cuts(sample: Sample, sequence_length: int, overlong: Overlong) -> list[tuple[int, int]] | Rejected:
    """The pieces [start, stop) of a sample that go into sequences, in order. Raises UserError for a long one where
    `overlong` is `error`.

    Pieces of a split sample overlap by one token, so that every token but the first is predicted exactly once.
    """
    length = len(sample)
    if sample.num_targets == 0:
        return NO_TARGETS
    if length <= sequence_length:
        return [(0, length)]
    if overlong == "split":
        starts = range(0, length - 1, sequence_length - 1)
        every = [(start, min(length, start + sequence_length)) for start in starts]
        return [cut for cut in every if piece(sample, *cut).num_targets]
    if overlong == "drop":
        return OVERLONG
    if overlong == "error":
        raise _too_long(sample.row, length, sequence_length)
    kept = _kept(length, sequence_length, overlong)
    return [kept] if piece(sample, *kept).num_targets else NO_TARGETS_LEFT


def fit(sample: Sample, sequence_length: int, overlong: Overlong) -> list[Sample] | Rejected:
    """The pieces themselves."""
    found = cuts(sample, sequence_length, overlong)
    return found if isinstance(found, Rejected) else [piece(sample, *cut) for cut in found]


def fit_together(unit: Unit, sequence_length: int, overlong: Overlong) -> Unit | Rejected:
    """Several samples that stay together, so they are never split (`split` drops them). Where they are truncated,
    each may keep an equal part of the sequence, and all must keep something to learn. Raises what `cuts` raises."""
    if not any(sample.num_targets for sample in unit):
        return NO_TARGETS
    length = sum(map(len, unit))
    if length <= sequence_length:
        return unit
    if overlong in ("split", "drop"):
        return OVERLONG
    if overlong == "error":
        raise _too_long(unit[0].row, length, sequence_length)
    share = sequence_length // len(unit)
    pieces = tuple(piece(sample, *_kept(len(sample), share, overlong)) for sample in unit)
    return pieces if all(each.num_targets for each in pieces) else NO_TARGETS_LEFT


def piece(sample: Sample, start: int, stop: int) -> Sample:
    """The tokens [start, stop) of a sample; nothing predicts the first of them."""
    return Sample(sample.input_ids[start:stop], sample.supervised[start:stop], sample.row)


def _kept(length: int, most: int, overlong: Overlong) -> tuple[int, int]:
    start = max(0, length - most) if overlong == "truncate_left" else 0
    return start, min(length, start + most)


def _too_long(row: RowId, length: int, sequence_length: int) -> UserError:
    return UserError(
        f"{row}: {length} tokens do not fit data.sequence_length {sequence_length}. "
        "Raise it, or set data.overlong to split, drop, truncate_left or truncate_right."
    )


class PackBuffer:
    """Units that wait for a sequence. The oldest, and the largest that fits, are found without looking at all: keys
    sort by length, and among equals the oldest last, so that the place left of what still fits holds the choice."""

    AGE_BITS = 40
    _NEWEST = 2**AGE_BITS - 1

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}  # by key, oldest first
        self._keys: list[int] = []  # sorted
        self._number = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Waiting]:
        """From the oldest to the newest."""
        return iter(self._waiting.values())

    def add(self, waiting: Waiting) -> None:
        """The newest."""
        key = (waiting.length << self.AGE_BITS) | (self._NEWEST - self._number)
        self._number += 1
        self._waiting[key] = waiting
        insort(self._keys, key)

    def pop_oldest(self) -> Waiting:
        """Take the one that has waited longest."""
        key = next(iter(self._waiting))
        del self._keys[bisect_left(self._keys, key)]
        return self._waiting.pop(key)

    def pop_largest(self, room: int) -> Waiting | None:
        """Take the largest of at most `room` tokens, the oldest of equals; None where none fits."""
        place = bisect_right(self._keys, (room << self.AGE_BITS) | self._NEWEST)
        return self._waiting.pop(self._keys.pop(place - 1)) if place else None


def next_bin(buffer: PackBuffer, length: int, refill: Callable[[], None]) -> list[Waiting]:
    """Take one bin out of the buffer; empty when there is nothing left.

    It starts with the oldest unit, so that none waits for more bins than the buffer has places; then comes the largest
    that fits, the oldest of equals. `refill` brings the buffer to its size before each choice.
    """
    refill()
    if not len(buffer):
        return []
    chosen = [buffer.pop_oldest()]
    room = length - chosen[0].length
    while room > 0:
        refill()
        best = buffer.pop_largest(room)
        if best is None:
            break
        chosen.append(best)
        room -= best.length
    return chosen
