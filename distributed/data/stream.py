"""The data stream of one rank: global batches that do not depend on who reads them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ...recipes.errors import UserError
from ...recipes.methods.base import Batch, Rejected, RowId, Sample
from ...recipes.schema import Recipe
from . import counters
from .cache import BlockCache
from .index import Index
from .lane_plan import keeper, plan_lanes
from .lanes import LaneReader, RowReader
from .logical import Bin, Encode, Lane, LogicalStream
from .share import Share, share_of

Collate = Callable[[Sequence[Sequence[Sample]], int], Batch]

READ_AHEAD_STEPS = 2
"""Finished steps that wait for the loop; more only helps against stalls longer than these."""

ENCODERS = 4
"""Streams that are read and encoded at once; the tokenizer lets go of the interpreter lock."""

LENGTH_MULTIPLE = 64
"""Sequences are padded to a multiple of this: few shapes for kernels and compilers, little waste."""


class MicroBatch(NamedTuple):
    """What goes through the model at once. `first_bin`: number g of its first bin in the global batch (the global
    batch size for one that is all padding); dropout is seeded by it."""

    batch: Batch
    first_bin: int


class StepBatches(NamedTuple):
    """One rank's part of one optimizer step.

    `served_bytes`: progress of the streams that this rank counts; over all ranks and steps it adds up to
    `total_bytes`. `counters`: running totals of the same streams. `num_bins` and `num_tokens`: real ones in this
    rank's micro-batches; a step with no bins on any rank is the end. `rejections`: some of the rows that were refused.
    `data_wait_s`: how long the loop waited for this step.
    """

    micro_batches: tuple[MicroBatch, ...]
    served_bytes: int
    counters: counters.Counts
    num_bins: int
    num_tokens: int
    rejections: tuple[tuple[RowId, Rejected], ...]
    data_wait_s: float


def collated_length(bins: Iterable[Sequence[Sample]], sequence_length: int) -> int:
    """Length of a batch: its longest bin, rounded up to `LENGTH_MULTIPLE`, at most `sequence_length`."""
    longest = max((sum(map(len, samples)) for samples in bins), default=0)
    return min(sequence_length, LENGTH_MULTIPLE * max(1, -(-longest // LENGTH_MULTIPLE)))


class _Step(NamedTuple):
    batches: StepBatches
    states: dict[str, dict[str, Any]]


class Stream:
    """The batches of one rank, read ahead in the background. The state is that of the last step handed out."""

    def __init__(
        self,
        streams: Mapping[int, LogicalStream],
        share: Share,
        cache: BlockCache,
        *,
        total_bytes: int,
        micro_batch_size: int,
        sequence_length: int,
        collate: Collate,
        pad_to_full: bool = False,
    ) -> None:
        self.total_bytes = total_bytes
        """Bytes that all streams serve in the whole run, for progress; 0 when the run is not counted in epochs."""
        self.data_wait_s = 0.0
        """Time the loop has waited for data."""
        self._streams = dict(streams)
        self._share = share
        self._cache = cache
        self._micro_batch_size = micro_batch_size
        self._sequence_length = sequence_length
        self._collate = collate
        self._pad_to_full = pad_to_full
        self._states = {str(number): stream.state() for number, stream in self._streams.items()}
        self._pool = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoder")
        self._queue: queue.Queue[_Step | BaseException] = queue.Queue(READ_AHEAD_STEPS)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def next_step(self) -> StepBatches:
        """This rank's micro-batches of the next step. Raises what reading or encoding raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, name="data-stream", daemon=True)
            self._thread.start()
        start = time.perf_counter()
        step = self._queue.get()
        if isinstance(step, BaseException):
            self._queue.put(step)  # for whoever asks again: nothing else will come
            raise step
        waited = time.perf_counter() - start
        self.data_wait_s += waited
        self._states = step.states
        return step.batches._replace(data_wait_s=waited)

    def state(self) -> dict[str, dict[str, Any]]:
        """The streams this rank serves, by number, after the last step handed out. JSON, about 1 KB each."""
        return self._states

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from the states of all ranks of a run at any world size; before the first `next_step`."""
        assert self._thread is None, "restore before the first step"
        for number, stream in self._streams.items():
            if str(number) not in states:
                raise UserError(f"the saved data state knows {len(states)} streams, but not stream {number}")
            stream.restore(states[str(number)])
        self._states = {str(number): stream.state() for number, stream in self._streams.items()}

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()  # the thread may be waiting for room
            self._thread.join(timeout=0.01)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._cache.close()

    def _read_ahead(self) -> None:
        while not self._stop.is_set():
            try:
                step: _Step | BaseException = self._make_step()
            except BaseException as error:  # handed to the loop, which raises it
                step = error
            self._queue.put(step)
            if isinstance(step, BaseException):
                return

    def _make_step(self) -> _Step:
        share = self._share
        drawn = list(self._pool.map(self._draw_bins, self._streams.values()))
        numbered = [
            (number + place * share.num_streams, one)
            for number, bins in zip(self._streams, drawn, strict=True)
            for place, one in enumerate(bins)
            if place % share.sharers == share.place
        ]
        micro_batches = self._micro_batches(numbered)
        batches = StepBatches(
            micro_batches,
            sum(one.served_bytes for bins in drawn for one in bins) if share.counts else 0,
            counters.total(stream.counts for stream in self._streams.values()) if share.counts else {},
            sum(bool(one.samples) for _, one in numbered),
            sum(micro.batch.num_tokens for micro in micro_batches),
            self._take_rejections(),
            0.0,
        )
        return _Step(batches, {str(number): stream.state() for number, stream in self._streams.items()})

    def _draw_bins(self, stream: LogicalStream) -> list[Bin]:
        return [stream.next_bin() for _ in range(self._share.bins_per_stream)]

    def _take_rejections(self) -> tuple[tuple[RowId, Rejected], ...]:
        taken = tuple(one for stream in self._streams.values() for one in stream.rejections)
        for stream in self._streams.values():
            stream.rejections.clear()
        return taken if self._share.counts else ()

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


def open_stream(
    *,
    index: Index,
    recipe: Recipe,
    world_rank: int,
    world_size: int,
    streams: int,
    encode: Encode,
    collate: Collate,
    pad_to_full: bool = False,
) -> Stream:
    """The training stream of one rank. `index`: of `recipe.data.train`, in its order; `streams`: logical streams, as
    recorded with the run. Raises UserError when they do not divide the global batch."""
    data, train = recipe.data, recipe.train
    share = share_of(world_rank, world_size, streams, train.global_batch_size, train.micro_batch_size)
    cache = BlockCache(index.read_block)
    rows = RowReader(index, cache)
    plans = plan_lanes(index, data, train, streams)
    keep = keeper(data)

    def logical(number: int) -> LogicalStream:
        readers = [
            LaneReader(plan.order, plan.block_ids, stream=number, rows=rows, keep=keep, max_epochs=plan.max_epochs)
            for plan in plans
        ]
        lanes = [
            Lane(plan.order.name, reader, plan.weight, plan.primary)
            for plan, reader in zip(plans, readers, strict=True)
        ]
        return LogicalStream(lanes, rows, data, encode)

    main = next(plan for plan in plans if plan.primary)
    return Stream(
        {number: logical(number) for number in share.streams},
        share,
        cache,
        total_bytes=main.order.nbytes * (main.max_epochs or 0),
        micro_batch_size=train.micro_batch_size,
        sequence_length=data.sequence_length,
        collate=collate,
        pad_to_full=pad_to_full,
    )
