"""Lines of plain files in byte ranges: files are never scanned, and a line belongs to the range in which it starts."""

from __future__ import annotations

import numpy as np

from .. import storage
from ..storage import FileInfo
from .block import UNKNOWN_ROWS, BlockAddress
from .order import Int64s

BLOCK_BYTES = 2**20
"""Bytes of a block of a plain file: one ranged read."""

MARGIN_BYTES = 2**16
"""Read beyond a block's end for the line that crosses it; doubled until the line ends."""

HEAD_BYTES = 2**16
COUNTED_BYTES = 8 * 2**20
BOM = b"\xef\xbb\xbf"


def ranges(file: FileInfo, block_bytes: int) -> tuple[Int64s, Int64s, Int64s]:
    """Starts, lengths and row counts [blocks] of byte ranges of `block_bytes`."""
    starts = np.arange(0, max(1, file.size), block_bytes, dtype=np.int64)
    return starts, np.minimum(block_bytes, file.size - starts), np.full(len(starts), UNKNOWN_ROWS)


def head(file: FileInfo) -> bytes:
    """A file's beginning: one whole line at least that is not blank, if it has one."""
    length = HEAD_BYTES
    while True:
        data = storage.read_file(file, 0, min(length, file.size))
        if length >= file.size or b"\n" in data.lstrip():
            return data
        length *= 4


def lines_of(address: BlockAddress) -> tuple[bytes, int]:
    """The lines that start in a byte range, and where the first one does."""
    size, start = address.file.size, address.start
    stop = start + address.nbytes
    begin = max(0, start - 1)
    data = storage.read_file(address.file, begin, min(stop + MARGIN_BYTES, size))
    first = 0 if start == 0 else data.find(b"\n") + 1
    if (start > 0 and first == 0) or begin + first >= stop:
        return b"", begin
    return _complete_last_line(data, begin, stop, address.file)[first:], begin + first


def _complete_last_line(data: bytes, begin: int, stop: int, file: FileInfo) -> bytes:
    """Cut after the line that crosses `stop`, reading on until it ends."""
    margin = MARGIN_BYTES
    while True:
        end = data.find(b"\n", stop - 1 - begin)
        if end >= 0:
            return data[: end + 1]
        read_to = begin + len(data)
        if read_to >= file.size:
            return data
        margin *= 2
        data += storage.read_file(file, read_to, min(read_to + margin, file.size))


def newlines_before(file: FileInfo, offset: int) -> int:
    """Newlines in front of a place; reads everything up to it, so it is asked only to name a broken line."""
    starts = range(0, offset, COUNTED_BYTES)
    return sum(storage.read_file(file, at, min(at + COUNTED_BYTES, offset)).count(b"\n") for at in starts)
