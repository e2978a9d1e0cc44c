"""Parquet: a block is a row group, of which only the needed columns are read. Pages are not read alone: a window of the
order takes all rows of its blocks, so a page that is skipped now would be fetched by another round trip soon after."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from datetime import date, time
from functools import lru_cache
from typing import Any

import numpy as np

from ...recipes.errors import UserError
from .. import storage
from ..storage import FileInfo
from .block import Block, BlockAddress, Scan
from .kinds import kinds_of_schema
from .memory import require_memory

FOOTER_BYTES = 2**16
"""Read from a parquet file's end in one go; footers are usually smaller."""

REMEDY = "Write the file with smaller row groups (pyarrow: row_group_size=10_000; pandas: row_group_size=10_000)."

GAP_BYTES = 2**20
"""Column chunks closer than this are fetched by one read: a round trip costs more than these bytes."""


class ArrowBlock:
    """Rows of an Arrow table."""

    def __init__(self, table: Any) -> None:
        columns = ((name, table.column(name)) for name in table.column_names)
        # Several chunks stay as they are: joined, a column of over 2 GiB of text would overflow its offsets.
        self._columns = {name: column.chunk(0) if column.num_chunks == 1 else column for name, column in columns}
        self.num_rows: int = table.num_rows
        self.memory_bytes: int = table.nbytes

    def row(self, number: int) -> dict[str, Any]:
        """One row as Python values; see `without_nulls`. Maps are dicts, dictionary-encoded values what they stand
        for."""
        return {
            name: without_nulls(column[number].as_py(maps_as_pydicts="strict"))
            for name, column in self._columns.items()
        }

    def line(self, _number: int) -> None:
        """Tables have no lines."""


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


def corrupt(file: FileInfo, kind: str, error: Exception) -> UserError:
    """The error for a file that its format's reader does not understand."""
    return UserError(f"{file.url}: not a readable {kind} file, or cut off ({error}). Write the file again.")


@lru_cache(maxsize=512)
def _footer(file: FileInfo) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    handle = RangeFile(file)
    handle.fetch(max(0, file.size - FOOTER_BYTES), file.size)
    try:
        return pq.read_metadata(pa.PythonFile(handle, mode="r"))
    except (pa.ArrowException, OSError) as error:
        raise corrupt(file, "parquet", error) from error


def _chunk_ranges(group: Any, wanted: Sequence[str] | None) -> list[tuple[int, int]]:
    """Byte ranges of the column chunks of a row group, ascending."""
    ranges = []
    for chunk in _chunks(group, wanted):
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
            start = min(start, chunk.dictionary_page_offset)
        ranges.append((start, start + chunk.total_compressed_size))
    return sorted(ranges)


def _chunks(group: Any, wanted: Sequence[str] | None) -> list[Any]:
    chunks = (group.column(number) for number in range(group.num_columns))
    return [chunk for chunk in chunks if wanted is None or _belongs(chunk.path_in_schema, wanted)]


def _belongs(path: str, wanted: Sequence[str]) -> bool:
    """Whether a leaf (`messages.list.element.role`) is of a wanted column; names may hold dots themselves."""
    return any(path == column or path.startswith(f"{column}.") for column in wanted)


def scan_parquet(file: FileInfo) -> Scan:
    """Row groups, from the footer alone. `nbytes` is the compressed size."""
    footer = _footer(file)
    groups = [_chunk_ranges(footer.row_group(number), None) for number in range(footer.num_row_groups)]
    starts = [min((start for start, _ in ranges), default=0) for ranges in groups]
    sizes = [max(1, sum(stop - start for start, stop in ranges)) for ranges in groups]
    rows = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    columns = kinds_of_schema(footer.schema.to_arrow_schema())
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


def decoded_bytes(address: BlockAddress) -> int:
    """Uncompressed bytes of a row group's needed columns, as the footer has them."""
    footer = _footer(address.file)
    wanted = wanted_columns(address, footer.schema.to_arrow_schema().names)
    chunks = _chunks(footer.row_group(address.number), wanted)
    return sum(int(chunk.total_uncompressed_size) for chunk in chunks)


def read_parquet(address: BlockAddress) -> Block:
    """One row group, needed columns only, in as few ranged reads as pay."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer = _footer(address.file)
    wanted = wanted_columns(address, footer.schema.to_arrow_schema().names)
    require_memory(address.file, decoded_bytes(address), f"row group {address.number}", REMEDY)
    handle = RangeFile(address.file)
    for start, stop in _coalesced(_chunk_ranges(footer.row_group(address.number), wanted)):
        handle.fetch(start, stop)
    try:
        parquet = pq.ParquetFile(pa.PythonFile(handle, mode="r"), metadata=footer)
        return ArrowBlock(parquet.read_row_group(address.number, columns=list(wanted), use_threads=False))
    except (pa.ArrowException, OSError) as error:
        raise corrupt(address.file, "parquet", error) from error
