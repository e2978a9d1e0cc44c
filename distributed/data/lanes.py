"""Reading a lane: from a position in the order to the rows themselves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from ...recipes.errors import UserError
from ...recipes.formats import REQUIRED
from .ahead import Drawn, Look, one_by_one
from .block import Block
from .cache import BlockCache
from .index import Index
from .order import WINDOW_BYTES, Int64s, LaneOrder, Segment, Slice, slice_rows

Row = dict[str, Any]

KNOWN_BLOCKS = 4096
"""Blocks whose facts are at hand: more than the windows of a rank's streams hold, as a rule."""


class Position(NamedTuple):
    """Where a stream is in a lane. `kept_epoch`: the last epoch in which it kept a row."""

    epoch: int = 0
    slice: int = 0
    offset: int = 0
    kept_epoch: int = 0


class Window(NamedTuple):
    """The rows that are shuffled together: those at `order[offset:]` are still to come."""

    slices: int
    nbytes: int
    blocks: list[int]
    decoded: list[Block]
    place: Int64s
    """[rows] which of `blocks`, in served order."""
    row: Int64s
    """[rows] row within its block, in served order."""


class RowReader:
    """Rows by (block, row), with their standard column names."""

    def __init__(self, index: Index, cache: BlockCache) -> None:
        self.index = index
        self.cache = cache
        self.facts = lru_cache(KNOWN_BLOCKS)(index.facts)
        """What the rows of a block have in common; looked up for every row."""

    def values(self, decoded: Block, block: int, row: int) -> Row:
        """One row: its needed columns, as far as they are there, under their standard names. Raises UserError when a
        required one is missing; a null is the method's to judge."""
        try:
            raw = decoded.row(row)
        except ValueError as error:
            raise UserError(f"{self.index.place(block, row, decoded)}: {error}") from error
        columns = self.facts(block).columns
        values = {standard: raw[name] for standard, name in columns if name in raw}
        if len(values) < len(columns):
            self._require(values, raw, block, partial(self.index.place, block, row, decoded))
        return values

    def place(self, drawn: Drawn) -> str:
        """A row's name in an error, with its line where the file has lines."""
        return self.index.place(drawn.block, drawn.row, self.cache.get(drawn.block))

    def read(self, block: int, row: int) -> Drawn:
        """One row by its address."""
        return Drawn(block, row, self.values(self.cache.get(block), block, row))

    def _require(self, values: Row, raw: Row, block: int, place: Callable[[], str]) -> None:
        info = self.facts(block).info
        for column in REQUIRED[info.format]:
            if column not in values:
                raise UserError(
                    f"{place()}: no value for '{info.columns.get(column, column)}', which format {info.format} needs. "
                    f"Columns there: {', '.join(raw)}."
                )


def bytes_of_epochs(order: LaneOrder, stream: int, epochs: Fraction) -> int:
    """Bytes that a stream serves in so many epochs; the last one may be served in part."""
    whole = math.floor(epochs)
    part = math.floor((epochs - whole) * order.segment_bytes(stream, whole))
    return sum(order.segment_bytes(stream, epoch) for epoch in range(whole)) + part


class LaneReader:
    """One stream's way through one lane.

    `block_ids` [blocks of the lane]: their numbers in the index. `look`: how its rows are looked at before they are
    drawn. `max_epochs` None: for ever, unless no row was kept for so many epochs that every segment must have come by.
    Of a part of an epoch the stream serves that part of its segment's bytes, from the front of the shuffled order.
    """

    def __init__(
        self,
        order: LaneOrder,
        block_ids: Int64s,
        *,
        stream: int,
        rows: RowReader,
        keep: Callable[[Row], bool],
        max_epochs: Fraction | None,
        look: Look = one_by_one,
    ) -> None:
        self._order = order
        self._block_ids = block_ids
        self._stream = stream
        self._rows = rows
        self._keep = keep
        self._look = look
        self._looked_at: deque[Drawn] = deque()  # the next rows of the open window
        self._max_epochs = max_epochs
        self._whole_epochs = 0 if max_epochs is None else math.floor(max_epochs)
        self._total_bytes = 0 if max_epochs is None else bytes_of_epochs(order, stream, max_epochs)
        self._window: Window | None = None
        self._segment: Segment | None = None
        self._ahead: list[Future[Block]] = []
        self._reads_ahead = True
        self._bytes_of_epochs = 0
        self.position = Position()
        self.streams = order.streams

    def restore(self, position: Position) -> None:
        """Go on from there."""
        self.position = position
        self._window = self._segment = None
        self._looked_at.clear()
        self._bytes_of_epochs = sum(self._order.segment_bytes(self._stream, epoch) for epoch in range(position.epoch))

    def ask_first(self) -> None:
        """Have the window at the position read, and until `ask_ahead` nothing that comes after it: the first rows of
        all streams share the link with nothing else. Only where the window is the small rest of a block, whose other
        rows another stream serves, the next one comes too: it will not do for a bin."""
        self._reads_ahead = False
        if self._max_epochs is None or self.position.epoch < self._max_epochs:
            self._prefetch(self.position.slice, self._order.mean_block_bytes // 3)

    def ask_ahead(self) -> None:
        """Have what comes after the open window read, and from now on after each that is opened."""
        self._reads_ahead = True
        if self._window is not None:
            self._ask_behind(self._window)

    def draw(self) -> Drawn | None:
        """The next row that is kept; None when the lane has ended for this stream."""
        while not self.has_ended():
            window = self._open_window()
            if window is None:
                self._next_epoch()
                continue
            if self.position.offset == len(window.row):
                self._next_window(window)
                continue
            drawn = self._take(window)
            if drawn.kept:
                return drawn
        return None

    def served_bytes(self) -> int:
        """Bytes of the order that lie behind; a window's in proportion to its rows."""
        return self._bytes_of_epochs + (0 if self.has_ended() else self._bytes_of_epoch())

    def total_bytes(self) -> int:
        """Bytes this stream serves in all its epochs; 0 when they have no end."""
        return self._total_bytes

    def progress(self) -> float:
        """Share of its bytes that lie behind."""
        return self.served_bytes() / self._total_bytes if self._total_bytes else 1.0

    def has_ended(self) -> bool:
        """Whether no row is left for this stream."""
        if self._max_epochs is not None and self.position.epoch >= self._whole_epochs:
            left = self._total_bytes - self._bytes_of_epochs  # of a last epoch that is served in part
            return left <= 0 or self._bytes_of_epoch() >= left
        return self.position.epoch - self.position.kept_epoch > self._order.streams + 8

    def _bytes_of_epoch(self) -> int:
        window = self._open_window()  # after a restore it may not be open yet
        assert self._segment is not None
        served = self._segment.bytes_before(self.position.slice)
        if window is not None and len(window.row):
            served += window.nbytes * self.position.offset // len(window.row)
        return served

    def _take(self, window: Window) -> Drawn:
        if not self._looked_at:
            self._looked_at.extend(self._look(self._rows_of(window)))
        drawn = self._looked_at.popleft()
        epoch, piece, offset, kept_epoch = self.position
        self.position = Position(epoch, piece, offset + 1, epoch if drawn.kept else kept_epoch)
        return drawn

    def _rows_of(self, window: Window) -> Iterator[Drawn]:
        """What is left of a window."""
        offset = self.position.offset
        for place, row in zip(window.place[offset:], window.row[offset:], strict=True):
            block, number = window.blocks[place], int(row)
            values = self._rows.values(window.decoded[place], block, number)
            yield Drawn(block, number, values, self._keep(values))

    def _open_window(self) -> Window | None:
        """The window at the position, decoded; None at a segment's end."""
        if self._window is not None:
            return self._window
        segment, first = self._open_segment(), self.position.slice
        if first >= len(segment):
            return None
        self._window = self._decode(segment, first)
        if self._reads_ahead:
            self._ask_behind(self._window)
        return self._window

    def _ask_behind(self, window: Window) -> None:
        """Ask for twice what was served and opened up to here, so that reading ahead grows as windows do."""
        first = self.position.slice
        opened = self._bytes_of_epochs + self._open_segment().bytes_before(first) + window.nbytes
        self._prefetch(first + window.slices, min(WINDOW_BYTES, 2 * opened))

    def _open_segment(self) -> Segment:
        if self._segment is None:
            self._segment = self._order.segment(self._stream, self.position.epoch)
        return self._segment

    def _prefetch(self, first: int, nbytes: int) -> None:
        """Have the windows from slice `first` on read, into the next epoch, until they hold so many bytes."""
        slices: list[Slice] = []
        due: list[float] = []
        for start, window in self._windows_from(first):
            slices += window
            due += [start] * len(window)
            nbytes -= sum(piece.nbytes for piece in window)
            if nbytes <= 0:
                break
        self._ahead = self._rows.cache.prefetch(*self._blocks(slices), due)

    def _windows_from(self, first: int) -> Iterator[tuple[float, list[Slice]]]:
        """The windows that are left of this epoch, and those of the next, each with the time in epochs at which it is
        opened."""
        segment, epoch = self._open_segment(), self.position.epoch
        yield from _timed_windows(segment, epoch, first)
        if self._max_epochs is None or epoch + 1 < self._max_epochs:
            yield from _timed_windows(self._order.segment(self._stream, epoch + 1), epoch + 1, 0)

    def _blocks(self, slices: Sequence[Slice]) -> tuple[list[int], set[int]]:
        """The blocks of slices by their numbers in the index, and those of them that others serve a part of."""
        blocks = [int(self._block_ids[piece.block]) for piece in slices]
        whole = [self._order.block_bytes(piece.block) for piece in slices]
        parts = {block for block, piece, size in zip(blocks, slices, whole, strict=True) if piece.nbytes < size}
        return blocks, parts

    def _decode(self, segment: Segment, first: int) -> Window:
        slices = segment.window(first)
        blocks, parts = self._blocks(slices)
        nbytes = sum(piece.nbytes for piece in slices)
        decoded = self._rows.cache.get_all(blocks, parts, needed_bytes=nbytes)
        ranges = [
            slice_rows(piece, self._order.block_bytes(piece.block), block.num_rows)
            for piece, block in zip(slices, decoded, strict=True)
        ]
        place = np.repeat(np.arange(len(ranges)), [len(rows) for rows in ranges])
        row = np.concatenate([np.arange(rows.start, rows.stop) for rows in ranges])
        order = self._order.window_order(self._stream, self.position.epoch, first, len(row))
        return Window(len(slices), nbytes, blocks, decoded, place[order], row[order])

    def _next_window(self, window: Window) -> None:
        self._window = None
        self.position = self.position._replace(slice=self.position.slice + window.slices, offset=0)

    def _next_epoch(self) -> None:
        self._bytes_of_epochs += self._order.segment_bytes(self._stream, self.position.epoch)
        self._segment = None
        self.position = self.position._replace(epoch=self.position.epoch + 1, slice=0, offset=0)


def _timed_windows(segment: Segment, epoch: int, first: int) -> Iterator[tuple[float, list[Slice]]]:
    for window in segment.windows(first):
        yield epoch + segment.bytes_before(first) / segment.nbytes, window
        first += len(window)
