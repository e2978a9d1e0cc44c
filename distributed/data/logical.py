"""A logical stream: rows of its lanes in mixed order, encoded, packed into bins. It knows no ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ...recipes.errors import UserError
from ...recipes.methods.base import Rejected, RowId, Sample
from ...recipes.schema import Data, RowFormat
from . import counters
from .lanes import Drawn, LaneReader, Position, RowReader
from .order import next_lane
from .pack import Address, Waiting, fit, next_bin

Encode = Callable[[Mapping[str, Any], RowFormat], Sample | Rejected]

STATE_VERSION = 1

NAMED_REJECTIONS = 8
"""Rejected rows that are named; all are counted."""

SPLITTABLE: frozenset[RowFormat] = frozenset({"text"})
"""Formats whose overlong rows are cut into pieces; an answer cut in two would teach the wrong thing."""


@dataclass
class Lane:
    """A lane of a stream: its reader, its exact weight, and whether the stream's epochs are counted on it."""

    name: str
    reader: LaneReader
    weight: int
    primary: bool


class Bin(NamedTuple):
    """Samples of one sequence, and the bytes of the primary lane that the stream went through to get them."""

    samples: list[Sample]
    served_bytes: int


class LogicalStream:
    """One of the streams that the data is cut into. `state()` after a bin is all that is needed to go on behind it."""

    def __init__(self, lanes: Sequence[Lane], rows: RowReader, data: Data, encode: Encode) -> None:
        self._lanes = {lane.name: lane for lane in lanes}
        self._primary = next(lane for lane in lanes if lane.primary)
        self._rows = rows
        self._data = data
        self._encode = encode
        self._buffer_size = data.pack_buffer if data.packing else 1
        self._draws = {lane.name: 0 for lane in lanes}  # of the lanes still in the mix
        self._buffer: list[Waiting] = []
        self._pending: list[Waiting] = []  # pieces of one long document that found no place yet
        self._accepted_epoch = 0
        self._served_bytes = 0
        self._done = False
        self.counts: counters.Counts = {}
        self.rejections: list[tuple[RowId, Rejected]] = []
        """Rejected rows since the caller last emptied this, the first `NAMED_REJECTIONS` of them."""

    def next_bin(self) -> Bin:
        """The next bin; empty once the stream has ended."""
        if self._data.packing:
            chosen = next_bin(self._buffer, self._data.sequence_length, self._refill)
        else:
            self._refill()
            chosen = [self._buffer.pop(0)] if self._buffer else []
        if not self._buffer:
            self._refill()  # so that the last bin is known to be the last, and takes the bytes that are left
        return Bin([waiting.sample for waiting in chosen], self._advance())

    def state(self) -> dict[str, Any]:
        """JSON, about a kilobyte: what the stream needs to go on, in any process."""
        return {
            "version": STATE_VERSION,
            "lanes": {name: list(lane.reader.position) for name, lane in self._lanes.items()},
            "draws": dict(self._draws),
            "buffer": [list(waiting.address) for waiting in self._buffer],
            "pending": list(self._pending[0].address) if self._pending else None,
            "accepted_epoch": self._accepted_epoch,
            "served_bytes": self._served_bytes,
            "counters": counters.copy(self.counts),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Waiting samples are read and encoded again, not counted again."""
        for name, position in state["lanes"].items():
            self._lanes[name].reader.restore(Position(*position))
        self._draws = dict(state["draws"])
        self._buffer = [self._again(Address(*address))[0] for address in state["buffer"]]
        self._pending = self._again(Address(*state["pending"])) if state["pending"] else []
        self._accepted_epoch = state["accepted_epoch"]
        self._served_bytes = state["served_bytes"]
        # Whether the stream has ended is found anew: the run may have been made longer.
        self._done = False
        self.counts = counters.copy(state["counters"])

    def _again(self, address: Address) -> list[Waiting]:
        """The waiting samples of a row, from a piece on."""
        drawn = self._rows.read(address.block, address.row)
        encoded = self._encoded(drawn)
        if isinstance(encoded, Rejected):
            raise UserError(
                f"{self._rows.index.row_id(address.block, address.row)}: the row was taken when the run was saved, and "
                f"is refused now ({encoded.reason}). Tokenizer, template or method have changed."
            )
        return _waiting(encoded[0], drawn)[address.piece :]

    def _refill(self) -> None:
        while len(self._buffer) < self._buffer_size and (self._pending or self._read_more()):
            self._buffer.append(self._pending.pop(0))

    def _read_more(self) -> bool:
        """Draw rows until one gives samples; False at the stream's end."""
        while not self._done and not self._pending:
            drawn = self._draw()
            if drawn is None or self._barren():
                self._done = True
                break
            self._pending = self._accept(drawn)
            if self._pending:
                self._accepted_epoch = self._primary.reader.position.epoch
        return bool(self._pending)

    def _barren(self) -> bool:
        """True when so many epochs gave no sample that none will."""
        return self._primary.reader.position.epoch - self._accepted_epoch > self._primary.reader.streams + 8

    def _draw(self) -> Drawn | None:
        """A row of the lane whose turn it is. A lane that ends leaves the mix; the primary one ends the stream."""
        while True:
            names = [name for name in self._lanes if name in self._draws]  # the recipe's order, not the saved one
            weights = [self._lanes[name].weight for name in names]
            name = names[next_lane(weights, [self._draws[name] for name in names])]
            drawn = self._lanes[name].reader.draw()
            if drawn is not None:
                self._draws[name] += 1
                return drawn
            if name == self._primary.name:
                return None
            self._draws = {other: 0 for other in names if other != name}

    def _encoded(self, drawn: Drawn) -> tuple[list[Sample], Sample] | Rejected:
        """The row's pieces, and the sample they are made of."""
        source = self._rows.index.sources[int(self._rows.index.block_source[drawn.block])]
        row_id = self._rows.index.row_id(drawn.block, drawn.row)
        try:
            encoded = self._encode(drawn.values, source.format)
        except ValueError as error:
            raise UserError(f"{self._rows.place(drawn)}: {error}") from error
        if isinstance(encoded, Rejected):
            return encoded
        sample = replace(encoded, row=row_id)
        fitted = fit(sample, self._data.sequence_length, self._data.overlong, source.format in SPLITTABLE)
        return fitted if isinstance(fitted, Rejected) else (fitted, sample)

    def _accept(self, drawn: Drawn) -> list[Waiting]:
        """Encode a row and fit it into sequences; empty when it was rejected. Everything is counted."""
        name = self._rows.index.sources[int(self._rows.index.block_source[drawn.block])].name
        counters.add(self.counts, name, "rows")
        encoded = self._encoded(drawn)
        if isinstance(encoded, Rejected):
            counters.add(self.counts, name, f"rejected/{encoded.reason}")
            if len(self.rejections) < NAMED_REJECTIONS:
                self.rejections.append((self._rows.index.row_id(drawn.block, drawn.row), encoded))
            return []
        pieces, sample = encoded
        counters.add(self.counts, name, "tokens", sum(map(len, pieces)))
        counters.add(self.counts, name, "supervised", sum(piece.num_targets for piece in pieces))
        if len(pieces) > 1:
            counters.add(self.counts, name, "split")
        elif len(pieces[0]) < len(sample):
            counters.add(self.counts, name, "truncated")
        return _waiting(pieces, drawn)

    def _advance(self) -> int:
        """Bytes of the primary lane since the last bin; the stream's last one takes all that is left."""
        ended = self._done and not self._buffer
        reader = self._primary.reader
        now = max(reader.total_bytes(), self._served_bytes) if ended else reader.served_bytes()
        served, self._served_bytes = now - self._served_bytes, now
        return served


def _waiting(pieces: Sequence[Sample], drawn: Drawn) -> list[Waiting]:
    return [Waiting(piece, Address(drawn.block, drawn.row, number), len(piece)) for number, piece in enumerate(pieces)]
