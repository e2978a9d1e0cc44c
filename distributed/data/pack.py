"""Fitting samples into sequences: splitting, truncating, and packing several into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from ...recipes.errors import UserError
from ...recipes.methods.base import Rejected, Sample

Overlong = Literal["drop", "truncate_left", "truncate_right", "error"]

OVERLONG = Rejected("overlong", "longer than data.sequence_length")
NO_TARGETS = Rejected("no_targets", "no supervised token")
NO_TARGETS_LEFT = Rejected("no_targets_after_truncation", "every supervised token was cut off")


class Address(NamedTuple):
    """Where a sample comes from: enough to read and encode it again."""

    block: int
    row: int
    piece: int


class Waiting(NamedTuple):
    """A sample in the packing buffer."""

    sample: Sample
    address: Address
    length: int
    """Tokens of the sample; looked at for every choice, so it is kept beside it."""


def fit(sample: Sample, sequence_length: int, overlong: Overlong, splittable: bool) -> list[Sample] | Rejected:
    """The pieces of a sample that go into sequences, in order.

    A splittable one (text) is cut into pieces that overlap by one token, so that every token but the first is
    predicted exactly once; another that is too long is dropped, truncated, or a UserError, as `overlong` says.
    """
    if sample.num_targets == 0:
        return NO_TARGETS
    if len(sample) <= sequence_length:
        return [sample]
    if splittable:
        return _split(sample, sequence_length)
    if overlong == "error":
        raise UserError(
            f"{sample.row}: {len(sample)} tokens do not fit data.sequence_length {sequence_length}. "
            "Raise it, or set data.overlong to drop, truncate_left or truncate_right."
        )
    if overlong == "drop":
        return OVERLONG
    start = len(sample) - sequence_length if overlong == "truncate_left" else 0
    piece = _piece(sample, start, start + sequence_length)
    return [piece] if piece.num_targets else NO_TARGETS_LEFT


def _piece(sample: Sample, start: int, stop: int) -> Sample:
    return Sample(sample.input_ids[start:stop], sample.supervised[start:stop], sample.row)


def _split(sample: Sample, length: int) -> list[Sample]:
    pieces = [_piece(sample, start, start + length) for start in range(0, len(sample) - 1, length - 1)]
    return [piece for piece in pieces if piece.num_targets]


def next_bin(buffer: list[Waiting], length: int, refill: Callable[[], None]) -> list[Waiting]:
    """Take one bin out of the buffer; empty when there is nothing left.

    It starts with the oldest sample, so that none waits longer than the buffer has places (in bins); then comes the
    largest that fits, the oldest of equals. `refill` brings the buffer to its size before each choice.
    """
    refill()
    if not buffer:
        return []
    chosen = [buffer.pop(0)]
    room = length - chosen[0].length
    while room > 0:
        refill()
        best = _largest_that_fits(buffer, room)
        if best is None:
            break
        chosen.append(buffer.pop(best))
        room -= chosen[-1].length
    return chosen


def _largest_that_fits(buffer: list[Waiting], room: int) -> int | None:
    best, best_length = None, 0
    for place, waiting in enumerate(buffer):
        if best_length < waiting.length <= room:
            best, best_length = place, waiting.length
    return best
