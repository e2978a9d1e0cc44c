"""Rows as units that fit a sequence: read, encoded, cut as the recipe says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...recipes.errors import UserError
from ...recipes.methods.base import Rejected, Sample
from ...recipes.schema import Data, Overlong, RowFormat, Source
from .ahead import Drawn, Look
from .index import Index
from .lanes import RowReader
from .pack import Address, Unit, Waiting, cuts, fit_together, piece, policy

Encode = Callable[[Mapping[str, Any], RowFormat], Sample | Unit | Rejected]
"""A row as one sample, or as several that must share a sequence."""


def policies(index: Index, data: Data, sources: Sequence[Source]) -> tuple[Overlong, ...]:
    """What becomes of the long rows of each source of an index; `sources` are those it was made of, in its order."""
    return tuple(
        policy(source.overlong or data.overlong, info.format)
        for source, info in zip(sources, index.sources, strict=True)
    )


class Intake:
    """What a stream takes in. `overlong` [sources of the index]; `look`: see `again`."""

    def __init__(
        self, rows: RowReader, encode: Encode, sequence_length: int, overlong: Sequence[Overlong], look: Look
    ) -> None:
        self._rows = rows
        self._encode = encode
        self._sequence_length = sequence_length
        self._overlong = overlong
        self._look = look

    def source(self, block: int) -> str:
        """The name of a block's source."""
        return self._rows.facts(block).info.name

    def encode(self, drawn: Drawn) -> Unit | Rejected:
        """A row's samples. Raises UserError that names a malformed row."""
        facts = self._rows.facts(drawn.block)
        try:
            encoded = self._encode(drawn.values, facts.info.format)
        except ValueError as error:
            raise UserError(f"{self._rows.place(drawn)}: {error}") from error
        if isinstance(encoded, Rejected):
            return encoded
        samples = (encoded,) if isinstance(encoded, Sample) else encoded
        row_id = facts.row_id(drawn.row)
        return tuple(Sample(sample.input_ids, sample.supervised, row_id) for sample in samples)

    def fit(self, unit: Unit, at: Address) -> list[Waiting] | Rejected:
        """What of a row's unit goes into sequences: all of it, or the tokens that the address names."""
        overlong = self._overlong[self._rows.facts(at.block).source]
        if len(unit) > 1:
            together = fit_together(unit, self._sequence_length, overlong)
            return together if isinstance(together, Rejected) else [_waiting(together, at)]
        (sample,) = unit
        part = piece(sample, at.start, at.stop) if at.stop else sample
        found = cuts(part, self._sequence_length, overlong)
        if isinstance(found, Rejected):
            return found
        if found == [(0, len(sample))]:
            return [_waiting(unit, at._replace(start=0, stop=0))]
        places = [(at.start + start, at.start + stop) for start, stop in found]
        return [_waiting((piece(sample, *place),), Address(at.block, at.row, *place)) for place in places]

    def again(self, addresses: Sequence[Address]) -> Iterator[list[Waiting] | Rejected]:
        """What was waiting when a run was saved, read anew and looked at some at a time, as new rows are. A change of
        sequence length that the user accepted may cut it otherwise, or reject it. Raises UserError when a row is no
        longer what it was."""
        looked_at: deque[Drawn] = deque()
        for number, at in enumerate(addresses):
            if not looked_at:
                looked_at.extend(self._look(self._rows.read(one.block, one.row) for one in addresses[number:]))
            yield self._fit_again(looked_at.popleft(), at)

    def _fit_again(self, drawn: Drawn, at: Address) -> list[Waiting] | Rejected:
        unit = self.encode(drawn)
        if isinstance(unit, Rejected) or at.stop > len(unit[0]):
            reason = unit.reason if isinstance(unit, Rejected) else f"it has only {len(unit[0])} tokens"
            raise UserError(
                f"{self._rows.index.row_id(at.block, at.row)}: the row was taken when the run was saved, and is "
                f"refused now ({reason}). Tokenizer, template or method have changed."
            )
        return self.fit(unit, at)


def _waiting(unit: Unit, at: Address) -> Waiting:
    return Waiting(unit, at, sum(map(len, unit)), at.saved())
