"""The bins of a reader's streams, step by step: the next step's are drawn while the last one's are laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from ...recipes.methods.base import Rejected, RowId
from .logical import Bin, LogicalStream

ENCODERS = 2
"""Threads in which a reader's streams read and encode: one holds the interpreter lock while the other's tokenizer works
without it. More of them only hand the lock around."""


class StreamBins(NamedTuple):
    """A stream's bins of one step, its state after them, and rows that were refused on the way."""

    bins: list[Bin]
    state: Mapping[str, Any]
    rejections: tuple[tuple[RowId, Rejected], ...]


class Drawing:
    """Draws the steps of some streams, one step ahead; a stream is always drawn from by one thread."""

    def __init__(self, streams: Mapping[int, LogicalStream], bins_per_stream: int) -> None:
        self._streams = streams
        self._bins_per_stream = bins_per_stream
        numbers = tuple(streams)
        # Few tasks a step: handing one to a thread costs as much as some rows.
        self._groups = [numbers[start::ENCODERS] for start in range(min(ENCODERS, len(numbers)))]
        self._ahead: list[Future[dict[int, StreamBins]]] | None = None
        self._pool = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoder")

    def next_step(self) -> dict[int, StreamBins]:
        """The streams' bins of the next step, in the streams' order. Raises what reading or encoding raises, every time
        it is asked again."""
        drawn = self._first_step() if self._ahead is None else _all_of(self._ahead)
        self._ahead = self._start()
        return {number: drawn[number] for number in self._streams}

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Bring the streams to these states, several at once; before the first step. Raises UserError."""
        list(self._pool.map(lambda number: self._streams[number].restore(states[str(number)]), self._streams))

    def close(self) -> None:
        """Wait for what is being drawn."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _first_step(self) -> dict[int, StreamBins]:
        """The first blocks of all streams are asked for before any stream waits for its own, and others after that."""
        for stream in self._streams.values():
            stream.ask_first()
        self._ahead = self._start()
        drawn = _all_of(self._ahead)
        for stream in self._streams.values():
            stream.ask_ahead()
        return drawn

    def _start(self) -> list[Future[dict[int, StreamBins]]]:
        return [self._pool.submit(self._draw, group) for group in self._groups]

    def _draw(self, numbers: Sequence[int]) -> dict[int, StreamBins]:
        return {number: self._bins_of(self._streams[number]) for number in numbers}

    def _bins_of(self, stream: LogicalStream) -> StreamBins:
        bins = [stream.next_bin() for _ in range(self._bins_per_stream)]
        rejections = tuple(stream.rejections)
        stream.rejections.clear()
        return StreamBins(bins, stream.state(), rejections)


def _all_of(groups: Sequence[Future[dict[int, StreamBins]]]) -> dict[int, StreamBins]:
    return {number: drawn for group in groups for number, drawn in group.result().items()}
