"""JSON lines, plain or compressed. Plain files are never scanned: a block is a byte range, and a row belongs to the
block in which its line starts."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...recipes.errors import UserError
from .. import storage
from ..storage import FileInfo
from .block import UNKNOWN_ROWS, Block, BlockAddress, Scan, one_block

BLOCK_BYTES = 2**20
"""Bytes of a block of a plain file: one ranged read."""

MARGIN_BYTES = 2**16
"""Read beyond a block's end for the line that crosses it; doubled until the line ends."""

HEAD_BYTES = 2**16
EXCERPT_CHARACTERS = 80
BOM = b"\xef\xbb\xbf"


class JsonlBlock:
    """Lines of a file; `offset` is where `data` begins in the (decompressed) file."""

    def __init__(self, data: bytes, offset: int, line_of: Callable[[int], int], url: str) -> None:
        """`line_of(offset)`: newlines before an offset of the file; asked only to name a broken line."""
        self._lines: list[bytes] = []
        self._offsets: list[int] = []
        self._line_of = line_of
        self._url = url
        for line in data.split(b"\n"):
            if line and not line.isspace():
                self._lines.append(line)
                self._offsets.append(offset)
            offset += len(line) + 1
        self.num_rows = len(self._lines)
        self.memory_bytes = len(data) + 64 * len(self._lines)

    def row(self, number: int) -> dict[str, Any]:
        """Parse one line."""
        line = self._lines[number].removeprefix(BOM)
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self._broken(number, f"not valid UTF-8 (byte {error.start} of the line)") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise self._broken(number, f"not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise self._broken(number, f"a row is a JSON object, not a {type(row).__name__}")
        return row

    def _broken(self, number: int, what: str) -> UserError:
        excerpt = self._lines[number][: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")[:EXCERPT_CHARACTERS]
        line = self._line_of(self._offsets[number]) + 1
        return UserError(f"{self._url}, line {line}: {what}: {excerpt!r}")


def scan_plain(file: FileInfo, block_bytes: int = BLOCK_BYTES) -> Scan:
    """Byte ranges of `block_bytes`; only the head is read, for the columns."""
    starts = np.arange(0, max(1, file.size), block_bytes, dtype=np.int64)
    sizes = np.minimum(block_bytes, file.size - starts)
    return Scan(starts, sizes, np.full(len(starts), UNKNOWN_ROWS), _first_columns(_plain_head(file), file.url))


def _plain_head(file: FileInfo) -> bytes:
    length = HEAD_BYTES
    while True:
        head = storage.read_range(file.url, 0, min(length, file.size))
        if length >= file.size or b"\n" in head.lstrip():
            return head
        length *= 4


def _first_columns(head: bytes, url: str) -> Sequence[str] | None:
    """Column names of the first row; a line that the head cuts off is not looked at unless it is the only one."""
    stripped = head.removeprefix(BOM).lstrip()
    if not stripped:
        return None
    line, _, _ = stripped.partition(b"\n")
    skipped = head[: len(head) - len(stripped)].count(b"\n")
    return list(JsonlBlock(line, 0, lambda _: skipped, url).row(0))


def read_plain(address: BlockAddress) -> Block:
    """The rows that start in a byte range."""
    url, size, start = address.file.url, address.file.size, address.start
    stop = start + address.nbytes
    begin = max(0, start - 1)
    data = storage.read_range(url, begin, min(stop + MARGIN_BYTES, size))
    first = 0 if start == 0 else data.find(b"\n") + 1
    if (start > 0 and first == 0) or begin + first >= stop:
        data, first = b"", 0
    else:
        data = _complete_last_line(data, begin, stop, address.file)
    return JsonlBlock(data[first:], begin + first, lambda offset: _newlines_before(url, offset), url)


def _complete_last_line(data: bytes, begin: int, stop: int, file: FileInfo) -> bytes:
    """Cut after the line that crosses `stop`, reading on until it ends."""
    margin = MARGIN_BYTES
    while True:
        end = data.find(b"\n", stop - 1 - begin)
        if end >= 0:
            return data[:end]
        read_to = begin + len(data)
        if read_to >= file.size:
            return data
        margin *= 2
        data += storage.read_range(file.url, read_to, min(read_to + margin, file.size))


def _newlines_before(url: str, offset: int, chunk_bytes: int = 8 * 2**20) -> int:
    ranges = range(0, offset, chunk_bytes)
    return sum(storage.read_range(url, at, min(at + chunk_bytes, offset)).count(b"\n") for at in ranges)


def _gunzip(data: bytes) -> bytes:
    return gzip.decompress(data)


def _unzstd(data: bytes) -> bytes:
    """All frames of a zstd file. Raises EOFError when the last one is cut off."""
    import zstandard

    out = io.BytesIO()
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            out.write(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if not frame.eof:
            raise EOFError("the last frame is cut off")
        data = frame.unused_data
    return out.getvalue()


DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": _gunzip, "zstd": _unzstd}


def _decompressed(url: str, method: str) -> bytes:
    try:
        return DECOMPRESS[method](storage.read_bytes(url))
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{url}: the {method} data is cut off or damaged ({error}). Write the file again.") from error


def scan_compressed(file: FileInfo, method: str) -> Scan:
    """One block. A compressed file can only be read from its start, so its columns are not looked at here."""
    return one_block(file, None)


def read_compressed(address: BlockAddress, method: str) -> Block:
    """All rows of a compressed file."""
    url = address.file.url
    data = _decompressed(url, method)
    return JsonlBlock(data, 0, lambda offset: data.count(b"\n", 0, offset), url)
