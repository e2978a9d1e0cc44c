"""Parts of steps: what one reader makes of some of a rank's streams. Everything here runs in the background."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from ...recipes.errors import UserError
from ...recipes.methods.base import Batch, Rejected, RowId, Sample
from ...recipes.schema import Data, Train
from . import counters
from .ahead import look_ahead
from .cache import BlockCache
from .drawing import Drawing
from .index import Index
from .intake import Encode, policies
from .lane_plan import keeper, plan_lanes
from .lanes import LaneReader, RowReader
from .logical import Bin, Lane, LogicalStream
from .node_cache import BlockReader, NodePlace
from .share import Share

Collate = Callable[[Sequence[Sequence[Sample]], int], Batch]
States = Mapping[str, Mapping[str, Any]]
"""Stream's number -> its state."""

LENGTH_MULTIPLE = 64
"""Sequences are padded to a multiple of this: few shapes for kernels and compilers, little waste."""


class MicroBatch(NamedTuple):
    """What goes through the model at once. `first_bin`: number g of its first bin in the global batch (the global
    batch size for one that is all padding); dropout is seeded by it."""

    batch: Batch
    first_bin: int


class Part(NamedTuple):
    """Some streams' part of one step. The fields are those of `stream.StepBatches`; `states`: what
    `PartReader.restore` takes, after this step; from another process as JSON."""

    micro_batches: tuple[MicroBatch, ...]
    served_bytes: int
    counters: counters.Counts
    num_bins: int
    num_tokens: int
    rejections: tuple[tuple[RowId, Rejected], ...]
    read_bytes: int
    needed_bytes: int
    states: States | bytes
    reader_idle_s: float = 0.0
    """How long the reader stood still with this part made, because enough others waited for the loop."""


def collated_length(bins: Iterable[Sequence[Sample]], sequence_length: int) -> int:
    """Length of a batch: its longest bin, rounded up to `LENGTH_MULTIPLE`, at most `sequence_length`."""
    longest = max((sum([len(sample.input_ids) for sample in samples]) for samples in bins), default=0)
    return min(sequence_length, LENGTH_MULTIPLE * max(1, -(-longest // LENGTH_MULTIPLE)))


def split_share(share: Share, micro_batch_size: int, readers: int) -> list[Share]:
    """A rank's share in at most `readers` parts, one after the other. Each but the last makes whole micro-batches, so
    that the micro-batches do not depend on the number of readers."""
    unit = micro_batch_size // math.gcd(micro_batch_size, share.bins_per_stream)
    units = len(share.streams) // unit
    number = max(1, min(readers, units)) if share.sharers == 1 else 1
    cuts = [place * units // number * unit for place in range(number)] + [len(share.streams)]
    sizes = [(stop - start) * share.bins_per_stream // micro_batch_size for start, stop in pairwise(cuts)]
    sizes[-1] = share.micro_batches - sum(sizes[:-1])  # the padding as well
    return [
        replace(share, streams=share.streams[start:stop], micro_batches=size)
        for (start, stop), size in zip(pairwise(cuts), sizes, strict=True)
    ]


class PartReader:
    """The parts of consecutive steps, made when they are asked for."""

    def __init__(
        self,
        streams: Mapping[int, LogicalStream],
        share: Share,
        cache: BlockCache,
        blocks: BlockReader,
        *,
        micro_batch_size: int,
        sequence_length: int,
        collate: Collate,
        pad_to_full: bool,
    ) -> None:
        self._streams = dict(streams)
        self._share = share
        self._cache = cache
        self._blocks = blocks
        self._micro_batch_size = micro_batch_size
        self._sequence_length = sequence_length
        self._collate = collate
        self._pad_to_full = pad_to_full
        self._bytes = (0, 0)
        self._drawing = Drawing(self._streams, share.bins_per_stream)

    def next_part(self) -> Part:
        """The next step's part. Raises what reading or encoding raises."""
        share = self._share
        drawn = self._drawing.next_step()
        numbered = [
            (number + place * share.num_streams, one)
            for number, stream in drawn.items()
            for place, one in enumerate(stream.bins)
            if place % share.sharers == share.place
        ]
        micro_batches = self._micro_batches(numbered)
        counted = drawn.values() if share.counts else ()
        return Part(
            micro_batches,
            sum(one.served_bytes for stream in counted for one in stream.bins),
            counters.total(stream.state["counters"] for stream in counted),
            sum(bool(one.samples) for _, one in numbered),
            sum(micro.batch.num_tokens for micro in micro_batches),
            tuple(one for stream in counted for one in stream.rejections),
            *self._take_bytes(),
            {str(number): stream.state for number, stream in drawn.items()},
        )

    def states(self) -> States:
        """The streams' states before the first step, by number; about 1 KB each as JSON."""
        return {str(number): stream.state() for number, stream in self._streams.items()}

    def restore(self, states: States) -> None:
        """Go on from the states of these streams, and perhaps others. Raises UserError."""
        for number in self._streams:
            if str(number) not in states:
                raise UserError(f"the saved data state knows {len(states)} streams, but not stream {number}")
        with self._cache.all_at_once():
            self._drawing.restore(states)

    def close(self) -> None:
        """Stop reading."""
        self._drawing.close()
        self._cache.close()

    def _take_bytes(self) -> tuple[int, int]:
        """Bytes read and bytes needed since this was last asked; of ranks that share a stream one needs them."""
        now = self._blocks.read_bytes, self._cache.needed_bytes if self._share.counts else 0
        before, self._bytes = self._bytes, now
        return now[0] - before[0], now[1] - before[1]

    def _micro_batches(self, numbered: Sequence[tuple[int, Bin]]) -> tuple[MicroBatch, ...]:
        """Lay bins out, those of one stream beside each other; missing ones are empty bins."""
        size = self._micro_batch_size
        nothing = (self._share.num_streams * self._share.bins_per_stream, Bin([], 0))
        padding = [nothing] * (self._share.micro_batches * size - len(numbered))
        every = [*numbered, *padding]
        groups = [every[start : start + size] for start in range(0, len(every), size)]
        return tuple(MicroBatch(self._batch([one.samples for _, one in group]), group[0][0]) for group in groups)

    def _batch(self, bins: Sequence[Sequence[Sample]]) -> Batch:
        length = self._sequence_length if self._pad_to_full else collated_length(bins, self._sequence_length)
        return self._collate(bins, length)


@dataclass(frozen=True)
class PartSpec:
    """What a reader is made of. It travels to another process, so `encode` and `collate` must be picklable there."""

    index: Index
    data: Data
    train: Train
    share: Share
    encode: Encode
    collate: Collate
    pad_to_full: bool
    cache_bytes: int
    node_place: NodePlace | None

    def open(self) -> PartReader:
        """The reader. Raises UserError."""
        stored = self.index.block_bytes
        blocks = BlockReader(self.index, self.node_place)
        cache = BlockCache(
            blocks.read,
            self.cache_bytes,
            stored_bytes=lambda block: int(stored[block]),
            read_part=blocks.read_part,
            neighbours=blocks,
        )
        rows = RowReader(self.index, cache)
        plans = plan_lanes(self.index, self.data, self.train, self.share.num_streams)
        keep = keeper(self.data)
        look = look_ahead(self.encode, lambda block: rows.facts(block).info.format)
        lane_reader = partial(LaneReader, rows=rows, keep=keep, look=look)
        overlong = policies(self.index, self.data, self.data.train)

        def logical(number: int) -> LogicalStream:
            readers = [
                lane_reader(plan.order, plan.block_ids, stream=number, max_epochs=plan.max_epochs) for plan in plans
            ]
            lanes = [
                Lane(plan.order.name, reader, plan.weight, plan.counted)
                for plan, reader in zip(plans, readers, strict=True)
            ]
            return LogicalStream(lanes, rows, self.data, self.encode, overlong, look)

        return PartReader(
            {number: logical(number) for number in self.share.streams},
            self.share,
            cache,
            blocks,
            micro_batch_size=self.train.micro_batch_size,
            sequence_length=self.data.sequence_length,
            collate=self.collate,
            pad_to_full=self.pad_to_full,
        )
