"""Parquet: a block is a row group, of which only the needed columns are read. Pages are not read alone: a window of the
order takes all rows of its blocks, so a page that is skipped now would be fetched by another round trip soon after."""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from datetime import date, time
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ...recipes.errors import UserError
from .. import storage
from ..storage import FileInfo
from .block import Block, BlockAddress, Scan
from .kinds import kinds_of_schema
from .memory import require_memory

T = TypeVar("T")

FOOTER_BYTES = 2**16
"""Read from a large parquet file's end in one go; footers are usually smaller."""

SMALL_FOOTER_BYTES = 2**13
"""The same of a small file: a hundredth of it in between. A footer that is longer costs another round trip."""

REMEDY = "Write the file with smaller row groups (pyarrow: row_group_size=10_000; pandas: row_group_size=10_000)."

GAP_BYTES = 2**20
"""Column chunks closer than this are fetched by one read: a round trip costs more than these bytes."""


class ArrowBlock:
    """Rows of an Arrow table."""

    def __init__(self, table: Any) -> None:
        self.table = table
        columns = ((name, table.column(name)) for name in table.column_names)
        # Several chunks stay as they are: joined, a column of over 2 GiB of text would overflow its offsets.
        self._columns = {name: column.chunk(0) if column.num_chunks == 1 else column for name, column in columns}
        self.num_rows: int = table.num_rows
        self.memory_bytes: int = table.nbytes

    def row(self, number: int) -> dict[str, Any]:
        """One row as Python values; see `without_nulls`. Maps are dicts, dictionary-encoded values what they stand for.
        Raises ValueError for text that is no UTF-8, and for a map with a key twice."""
        return {name: _value(name, column[number]) for name, column in self._columns.items()}

    def line(self, _number: int) -> None:
        """Tables have no lines."""


def _value(name: str, scalar: Any) -> Any:
    try:
        return without_nulls(scalar.as_py(maps_as_pydicts="strict"))
    except UnicodeDecodeError as error:
        raise ValueError(f"column {name} is not valid UTF-8 (byte {error.start} of the value)") from error
    except KeyError as error:
        raise ValueError(f"column {name} holds a map with a key twice: {error}") from error


def freeze(block: ArrowBlock) -> Any:
    """A block as a table."""
    return block.table


def thaw(table: Any, _address: BlockAddress) -> Block:
    """The block of a table."""
    return ArrowBlock(table)


def without_nulls(value: Any) -> Any:
    """Drop null fields of nested structs, except `content`: Arrow gives every message all fields that any message
    has, and chat templates ask `'tool_calls' in message`. Dates become text, as they would be in JSON."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return value.isoformat() if isinstance(value, date | time) else value


class RangeFile(io.RawIOBase):
    """A seekable file over `storage.read_file`, with parts fetched ahead; pyarrow reads through it, so that
    retries and errors are those of storage."""

    def __init__(self, file: FileInfo) -> None:
        super().__init__()
        self._file = file
        self._position = 0
        self._starts: list[int] = []
        self._parts: list[bytes] = []

    def fetch(self, start: int, stop: int) -> None:
        """Bring bytes [start, stop) into memory; calls come in ascending order."""
        self._starts.append(start)
        self._parts.append(storage.read_file(self._file, start, stop))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.size - self._position)
        length = left if size is None or size < 0 else min(size, left)
        data = self._read_at(self._position, length)
        self._position += length
        return data

    def _read_at(self, start: int, length: int) -> bytes:
        part = bisect_right(self._starts, start) - 1
        if part >= 0 and start + length <= self._starts[part] + len(self._parts[part]):
            offset = start - self._starts[part]
            return self._parts[part][offset : offset + length]
        return storage.read_file(self._file, start, start + length)


def readable(file: FileInfo, kind: str, look: Callable[[], T]) -> T:
    """What `look` finds in a file. Raises UserError where its bytes are not what its format says."""
    import pyarrow as pa

    try:
        return look()
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise UserError(
            f"{file.url}: not a readable {kind} file, or cut off ({error}). Write the file again."
        ) from error


@lru_cache(maxsize=512)
def _footer(file: FileInfo) -> Any:
    """What stands at a file's end and nothing before it: pyarrow by itself would read 64 KiB more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    end = min(file.size, FOOTER_BYTES, max(SMALL_FOOTER_BYTES, file.size // 100))
    data = storage.read_file(file, file.size - end, file.size)
    length = int.from_bytes(data[-8:-4], "little") + 8  # the file ends with the footer's length and a magic word
    if len(data) < length <= file.size:
        data = storage.read_file(file, file.size - length, file.size - len(data)) + data
    return readable(file, "parquet", lambda: pq.read_metadata(pa.BufferReader(data[-length:])))


def read_metadata(file: FileInfo) -> dict[bytes, bytes]:
    """A parquet file's own key-value metadata. Raises UserError for a damaged one."""
    return dict(_footer(file).metadata or {})


class _Part(NamedTuple):
    """Of a row group: columns, byte ranges of their chunks in ascending order, and their size uncompressed."""

    columns: tuple[str, ...]
    ranges: list[tuple[int, int]]
    decoded_bytes: int


def _part(group: Any, columns: Sequence[str]) -> _Part:
    chunks = [group.column(number) for number in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if _belongs(chunk.path_in_schema, columns)]
    size = sum(int(chunk.total_uncompressed_size) for chunk in wanted)
    return _Part(tuple(columns), sorted(map(_chunk_range, wanted)), size)


def _chunk_range(chunk: Any) -> tuple[int, int]:
    start = int(chunk.data_page_offset)
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        start = min(start, int(chunk.dictionary_page_offset))
    return start, start + int(chunk.total_compressed_size)


def _belongs(path: str, wanted: Sequence[str]) -> bool:
    """Whether a leaf (`messages.list.element.role`) is of a wanted column; names may hold dots themselves."""
    return any(path == column or path.startswith(f"{column}.") for column in wanted)


def scan_parquet(file: FileInfo) -> Scan:
    """Row groups, from the footer alone. `nbytes` is the compressed size."""
    return readable(file, "parquet", lambda: _scan_footer(file, _footer(file)))


def _scan_footer(file: FileInfo, footer: Any) -> Scan:
    columns = kinds_of_schema(footer.schema.to_arrow_schema())
    groups = [_part(footer.row_group(number), list(columns)).ranges for number in range(footer.num_row_groups)]
    if not all(0 <= start <= stop <= file.size for ranges in groups for start, stop in ranges):
        raise ValueError("its footer names columns that it does not hold")
    starts = [min((start for start, _ in ranges), default=0) for ranges in groups]
    sizes = [max(1, sum(stop - start for start, stop in ranges)) for ranges in groups]
    rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    return Scan(np.array(starts, np.int64), np.array(sizes, np.int64), np.array(rows, np.int64), columns)


def _coalesced(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and start - joined[-1][1] <= GAP_BYTES:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def wanted_columns(address: BlockAddress, there: Sequence[str]) -> tuple[str, ...]:
    """The needed ones of the columns that are there."""
    return tuple(there) if address.columns is None else tuple(name for name in address.columns if name in there)


def _wanted_part(address: BlockAddress) -> _Part:
    def look() -> _Part:
        footer = _footer(address.file)
        columns = wanted_columns(address, footer.schema.to_arrow_schema().names)
        return _part(footer.row_group(address.number), columns)

    return readable(address.file, "parquet", look)


def require_to_fit(address: BlockAddress) -> None:
    """Raises UserError for a row group whose needed columns, as the footer has their sizes, do not fit into memory."""
    _require(address, _wanted_part(address))


def _require(address: BlockAddress, part: _Part) -> None:
    require_memory(address.file, part.decoded_bytes, f"row group {address.number}", REMEDY)


def read_parquet(address: BlockAddress) -> Block:
    """One row group, needed columns only, in as few ranged reads as pay."""
    return read_row_groups([address])[0]


def read_row_groups(addresses: Sequence[BlockAddress]) -> list[Block]:
    """The same of several row groups of one file, in ascending order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = addresses[0].file
    parts = [_wanted_part(address) for address in addresses]
    for address, part in zip(addresses, parts, strict=True):
        _require(address, part)
    footer, handle = _footer(file), RangeFile(file)
    for start, stop in _coalesced(sorted(chunk for part in parts for chunk in part.ranges)):
        handle.fetch(start, stop)

    def decode() -> list[Any]:
        parquet = pq.ParquetFile(pa.PythonFile(handle, mode="r"), metadata=footer)
        return [
            parquet.read_row_group(address.number, columns=list(part.columns), use_threads=False)
            for address, part in zip(addresses, parts, strict=True)
        ]

    return [ArrowBlock(table) for table in readable(file, "parquet", decode)]
