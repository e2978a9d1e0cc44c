"""A logical stream: rows of its lanes in mixed order, encoded, packed into bins. It knows no ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...recipes.errors import UserError
from ...recipes.methods.base import Rejected, RowId, Sample
from ...recipes.schema import Data, Overlong
from . import counters
from .ahead import Drawn, Look, one_by_one
from .intake import Encode, Intake
from .lanes import LaneReader, Position, RowReader
from .order import next_lane
from .pack import Address, PackBuffer, Unit, Waiting, next_bin

STATE_VERSION = 3

NAMED_REJECTIONS = 8
"""Rejected rows that are named; all are counted."""


@dataclass
class Lane:
    """A lane of a stream: its reader, its exact weight, and whether the stream's progress is counted on it."""

    name: str
    reader: LaneReader
    weight: int
    counted: bool


class Bin(NamedTuple):
    """Samples of one sequence, and the bytes of the counted lanes that the stream went through to get them."""

    samples: list[Sample]
    served_bytes: int


class LogicalStream:
    """One of the streams that the data is cut into. `state()` after a bin is all that is needed to go on behind it.

    Where one lane of several is counted, the draws follow the weights, and the stream ends with that lane. Where all
    are, each is served to its own end, and the one that is least far on its way serves next: all end together.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        rows: RowReader,
        data: Data,
        encode: Encode,
        overlong: Sequence[Overlong],
        look: Look = one_by_one,
    ) -> None:
        """`overlong` [sources of the index]: what becomes of long rows. `look`: how rows that were waiting when a run
        was saved are looked at before they are encoded."""
        self._lanes = {lane.name: lane for lane in lanes}
        self._counted = [lane for lane in lanes if lane.counted]
        self._rows = rows
        self._intake = Intake(rows, encode, data.sequence_length, overlong, look)
        self._packing = data.packing
        self._sequence_length = data.sequence_length
        self._buffer_size = data.pack_buffer if data.packing else 1
        self._draws = {lane.name: 0 for lane in lanes}  # of the lanes still in the mix
        self._buffer = PackBuffer()
        self._pending: list[Waiting] = []  # pieces of one long document that found no place yet
        self._accepted_epoch = 0
        self._served_bytes = 0
        self._done = False
        self.counts: counters.Counts = {}
        self.rejections: list[tuple[RowId, Rejected]] = []
        """Rejected rows since the caller last emptied this, the first `NAMED_REJECTIONS` of them."""

    def ask_first(self) -> None:
        """Have what the first bin needs read, and nothing else yet."""
        for lane in self._lanes.values():
            lane.reader.ask_first()

    def ask_ahead(self) -> None:
        """Have what later bins need read, now and from now on."""
        for lane in self._lanes.values():
            lane.reader.ask_ahead()

    def next_bin(self) -> Bin:
        """The next bin; empty once the stream has ended. The last ones may be partly filled."""
        if self._packing:
            chosen = next_bin(self._buffer, self._sequence_length, self._refill)
        else:
            self._refill()
            chosen = [self._buffer.pop_oldest()] if len(self._buffer) else []
        if not len(self._buffer):
            self._refill()  # so that the last bin is known to be the last, and takes the bytes that are left
        for waiting in chosen:
            self._count_served(waiting)
        return Bin([sample for waiting in chosen for sample in waiting.samples], self._advance())

    def state(self) -> dict[str, Any]:
        """JSON, about a kilobyte: what the stream needs to go on, in any process."""
        return {
            "version": STATE_VERSION,
            "lanes": {name: list(lane.reader.position) for name, lane in self._lanes.items()},
            "weights": self._weights(),
            "draws": dict(self._draws),
            "buffer": [waiting.saved for waiting in self._buffer],
            "pending": _rest(self._pending).saved() if self._pending else None,
            "accepted_epoch": self._accepted_epoch,
            "served_bytes": self._served_bytes,
            "counters": counters.copy(self.counts),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, as far as that needs no row: blocks are asked for, and `take_back` has to
        follow. Raises UserError for a state of another version, or of other lanes."""
        if state["version"] != STATE_VERSION or state["lanes"].keys() != self._lanes.keys():
            raise UserError(
                f"the saved data state is of version {state['version']} with lanes {', '.join(state['lanes'])}; this "
                f"run has version {STATE_VERSION} with {', '.join(self._lanes)}. Begin a new run with --fresh."
            )
        waiting = [address[0] for address in [*state["buffer"], state["pending"]] if address]
        self._rows.cache.prefetch(waiting, waiting)
        for name, position in state["lanes"].items():
            self._lanes[name].reader.restore(Position(*position))
        self.ask_first()
        self.counts = counters.copy(state["counters"])
        self._accepted_epoch = state["accepted_epoch"]
        self._served_bytes = state["served_bytes"]
        # Whether the stream has ended is found anew: the run may have been made longer.
        self._done = False

    def take_back(self, state: Mapping[str, Any]) -> None:
        """The rest of `restore`: samples that were waiting are read and encoded again, not counted again. Raises
        UserError for rows that are no longer what they were."""
        self._draws = self._restored_draws(state)
        self._buffer = PackBuffer()
        for one in self._again(state["buffer"]):
            self._buffer.add(one)
        self._pending = self._again([state["pending"]]) if state["pending"] else []

    def _weights(self) -> dict[str, int]:
        return {name: lane.weight for name, lane in self._lanes.items()}

    def _restored_draws(self, state: Mapping[str, Any]) -> dict[str, int]:
        """The draws so far; counted from here on when the weights were changed, or when a lane that had ended has got
        more epochs. New shares hold from here on, then: nothing makes up for the old ones."""
        saved = state["draws"]
        mix = [name for name, lane in self._lanes.items() if name in saved or not lane.reader.has_ended()]
        if state["weights"] == self._weights() and len(mix) == len(saved):
            return dict(saved)
        return dict.fromkeys(mix, 0)

    def _again(self, saved: Sequence[Sequence[int]]) -> list[Waiting]:
        """The units of addresses, in the sequences of now."""
        addresses = [Address(*one) for one in saved]
        units: list[Waiting] = []
        for address, found in zip(addresses, self._intake.again(addresses), strict=True):
            units += self._reject(address.block, address.row, found) if isinstance(found, Rejected) else found
        return units

    def _refill(self) -> None:
        while len(self._buffer) < self._buffer_size and (self._pending or self._read_more()):
            self._buffer.add(self._pending.pop(0))

    def _read_more(self) -> bool:
        """Draw rows until one gives samples; False at the stream's end."""
        while not self._done and not self._pending:
            drawn = self._draw()
            if drawn is None or self._barren():
                self._done = True
                break
            self._pending = self._accept(drawn)
            if self._pending:
                self._accepted_epoch = self._epoch()
        return bool(self._pending)

    def _epoch(self) -> int:
        return min(lane.reader.position.epoch for lane in self._counted)

    def _barren(self) -> bool:
        """True when so many epochs gave no sample that none will."""
        return self._epoch() - self._accepted_epoch > self._counted[0].reader.streams + 8

    def _draw(self) -> Drawn | None:
        """A row of the lane whose turn it is; None at the end. A lane that ends leaves the mix."""
        while any(lane.name in self._draws for lane in self._counted):
            names = [name for name in self._lanes if name in self._draws]  # the recipe's order, not the saved one
            name = self._next_lane(names)
            drawn = self._lanes[name].reader.draw()
            if drawn is not None:
                self._draws[name] += 1
                return drawn
            self._draws = {other: 0 for other in names if other != name}
        return None

    def _next_lane(self, names: Sequence[str]) -> str:
        if len(names) > 1 and len(self._counted) == len(self._lanes):
            return min(names, key=lambda name: self._lanes[name].reader.progress())
        return names[next_lane([self._lanes[name].weight for name in names], [self._draws[name] for name in names])]

    def _accept(self, drawn: Drawn) -> list[Waiting]:
        """Encode a row and fit it into sequences; empty when it was rejected. Everything is counted."""
        counters.add(self.counts, self._intake.source(drawn.block), "rows")
        unit = self._intake.encode(drawn)
        if isinstance(unit, Rejected):
            return self._reject(drawn.block, drawn.row, unit)
        fitted = self._intake.fit(unit, Address(drawn.block, drawn.row))
        self._count_fitted(drawn, unit, [] if isinstance(fitted, Rejected) else fitted)
        return self._reject(drawn.block, drawn.row, fitted) if isinstance(fitted, Rejected) else fitted

    def _reject(self, block: int, row: int, rejected: Rejected) -> list[Waiting]:
        counters.add(self.counts, self._intake.source(block), f"rejected/{rejected.reason}")
        if len(self.rejections) < NAMED_REJECTIONS:
            self.rejections.append((self._rows.index.row_id(block, row), rejected))
        return []

    def _count_fitted(self, drawn: Drawn, unit: Unit, fitted: Sequence[Waiting]) -> None:
        """What the length of a sequence did to a row. Samples and pieces predict all of their tokens but the first."""
        if len(fitted) == 1 and fitted[0].samples is unit:
            return  # most rows fit as they are
        name = self._intake.source(drawn.block)
        kept = [sample for waiting in fitted for sample in waiting.samples]
        lost = sum(len(sample) - 1 for sample in unit) - sum(len(sample) - 1 for sample in kept)
        if lost and sum(map(len, unit)) > self._sequence_length:
            counters.add(self.counts, name, "lost_tokens", lost if kept else sum(map(len, unit)))
        if len(fitted) > 1:
            counters.add(self.counts, name, "split")
        elif kept and lost:
            counters.add(self.counts, name, "truncated")

    def _count_served(self, waiting: Waiting) -> None:
        name = self._intake.source(waiting.address.block)
        counters.add(self.counts, name, "samples", len(waiting.samples))
        counters.add(self.counts, name, "tokens", waiting.length)
        counters.add(self.counts, name, "supervised", sum(sample.num_targets for sample in waiting.samples))

    def _advance(self) -> int:
        """Bytes of the counted lanes since the last bin; the stream's last one takes all that is left."""
        ended = self._done and not len(self._buffer)
        now = sum(lane.reader.total_bytes() if ended else lane.reader.served_bytes() for lane in self._counted)
        now = max(now, self._served_bytes)
        served, self._served_bytes = now - self._served_bytes, now
        return served


def _rest(pieces: Sequence[Waiting]) -> Address:
    """The address of what is left of a document."""
    return pieces[0].address._replace(stop=pieces[-1].address.stop)
