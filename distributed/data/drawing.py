"""The bins of a reader's streams, step by step: the next steps' are drawn while the last one's are laid out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from ...recipes.methods.base import Rejected, RowId
from .logical import Bin, LogicalStream

ENCODERS = 2
"""Threads in which a reader's streams read and encode: one holds the interpreter lock while the other's tokenizer works
without it. More of them only hand the lock around."""

STEPS_AHEAD = 3
"""Steps that are drawn ahead. Texts are tokenised some at a time, so that steps which need new ones take longer than
others: with one step ahead the encoders would wait for each other at every step."""


class StreamBins(NamedTuple):
    """A stream's bins of one step, its state after them, and rows that were refused on the way."""

    bins: list[Bin]
    state: Mapping[str, Any]
    rejections: tuple[tuple[RowId, Rejected], ...]


class Drawing:
    """Draws the steps of some streams, a few steps ahead; a stream is always drawn from by one thread."""

    def __init__(self, streams: Mapping[int, LogicalStream], bins_per_stream: int) -> None:
        self._streams = streams
        self._bins_per_stream = bins_per_stream
        numbers = tuple(streams)
        # Few tasks a step: handing one to a thread costs as much as some rows.
        self._encoders = [_Encoder(numbers[start::ENCODERS]) for start in range(min(ENCODERS, len(numbers)))]
        self._begun = False

    def next_step(self) -> dict[int, StreamBins]:
        """The streams' bins of the next step, in the streams' order. Raises what reading or encoding raises, every time
        it is asked again."""
        if not self._begun:
            self._first_step()
        drawn: dict[int, StreamBins] = {}
        for encoder in self._encoders:
            drawn |= encoder.ahead[0].result()
        for encoder in self._encoders:
            encoder.ahead.popleft()
            self._draw_ahead(encoder, STEPS_AHEAD)
        return {number: drawn[number] for number in self._streams}

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Bring the streams to these states; before the first step. What all of them need is asked for before any
        waits for its own, so that it costs one round trip. Raises UserError."""
        for number, stream in self._streams.items():
            stream.restore(states[str(number)])
        with ThreadPoolExecutor(ENCODERS) as pool:
            list(pool.map(lambda number: self._streams[number].take_back(states[str(number)]), self._streams))

    def close(self) -> None:
        """Wait for what is being drawn."""
        for encoder in self._encoders:
            encoder.thread.shutdown(wait=True, cancel_futures=True)

    def _first_step(self) -> None:
        """The first blocks of all streams are asked for before any stream waits for its own, and others after that."""
        self._begun = True
        for stream in self._streams.values():
            stream.ask_first()
        for encoder in self._encoders:
            self._draw_ahead(encoder, 1)
        wait(encoder.ahead[0] for encoder in self._encoders)
        for stream in self._streams.values():
            stream.ask_ahead()

    def _draw_ahead(self, encoder: _Encoder, steps: int) -> None:
        while len(encoder.ahead) < steps:
            encoder.ahead.append(encoder.thread.submit(self._draw, encoder.numbers))

    def _draw(self, numbers: Sequence[int]) -> dict[int, StreamBins]:
        return {number: self._bins_of(self._streams[number]) for number in numbers}

    def _bins_of(self, stream: LogicalStream) -> StreamBins:
        bins = [stream.next_bin() for _ in range(self._bins_per_stream)]
        rejections = tuple(stream.rejections)
        stream.rejections.clear()
        return StreamBins(bins, stream.state(), rejections)


class _Encoder:
    """A thread, the streams it draws from, and the steps it has begun."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.ahead: deque[Future[dict[int, StreamBins]]] = deque()
