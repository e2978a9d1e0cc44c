"""Evaluation: every row once, in file order, at any world size."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from fractions import Fraction
from typing import Any

from ...recipes.schema import Data, Source
from . import counters
from .ahead import look_ahead
from .cache import BlockCache
from .held_out import held_out
from .index import Index
from .intake import Encode, policies
from .lane_plan import ALL_SOURCES
from .lanes import LaneReader, RowReader
from .logical import Lane, LogicalStream
from .order import LaneOrder
from .parts import Collate, MicroBatch, collated_length


class EvalBatches:
    """An iterator over one rank's micro-batches of an eval set; ranks may have different numbers of them.

    `index` is of `source` alone; with `held_out_fraction` that is training data, and only its held-out rows are served.
    Rank r reads the r-th of `world_size` parts of equal bytes. Every bin is packed as in training.
    `counters` are complete at the end.
    """

    def __init__(
        self,
        index: Index,
        *,
        data: Data,
        world_rank: int,
        world_size: int,
        micro_batch_size: int,
        encode: Encode,
        collate: Collate,
        source: Source,
        held_out_fraction: float | None = None,
    ) -> None:
        self._cache = BlockCache(index.read_block, stored_bytes=lambda block: int(index.block_bytes[block]))
        self._collate = collate
        self._sequence_length = data.sequence_length
        self._micro_batch_size = micro_batch_size
        rows = RowReader(index, self._cache)
        blocks = index.used_blocks
        order = LaneOrder(ALL_SOURCES, index.order_bytes[blocks], streams=world_size, seed=0, shuffle=False)

        def keep(row: Mapping[str, Any]) -> bool:
            return held_out_fraction is None or held_out(row, held_out_fraction)

        look = look_ahead(encode, lambda block: rows.facts(block).info.format)
        reader = LaneReader(order, blocks, stream=world_rank, rows=rows, keep=keep, max_epochs=Fraction(1), look=look)
        lanes = [Lane(ALL_SOURCES, reader, 1, True)]
        self._stream = LogicalStream(lanes, rows, data, encode, policies(index, data, [source]))

    @property
    def counters(self) -> counters.Counts:
        """Rows, tokens and rejections of this rank so far."""
        return counters.copy(self._stream.counts)

    def __iter__(self) -> Generator[MicroBatch, None, None]:
        number = 0
        try:
            while True:
                bins = [self._stream.next_bin().samples for _ in range(self._micro_batch_size)]
                if not bins[0]:
                    return
                yield MicroBatch(self._collate(bins, collated_length(bins, self._sequence_length)), number)
                number += self._micro_batch_size
        finally:
            self._cache.close()


def empty_batch(micro_batch_size: int, data: Data, collate: Collate) -> MicroBatch:
    """What a rank that has run out of rows computes while others have not: all padding, no weight."""
    bins: list[list[Any]] = [[] for _ in range(micro_batch_size)]
    return MicroBatch(collate(bins, collated_length(bins, data.sequence_length)), 0)
