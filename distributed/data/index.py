"""The index: which files and blocks the data is made of, with what they looked like when the run began.

Nothing is converted: parquet footers are read, JSON lines are only cut into byte ranges. The index lies in the run
directory as two parquet tables, and a file whose size or etag has changed since is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ...recipes.methods.base import RowId
from ...recipes.schema import Source
from .. import storage
from ..storage import FileInfo
from .block import ALL_ROWS, UNKNOWN_ROWS, Block, BlockAddress, RowRange, Scan
from .formats import FORMATS
from .order import Int64s
from .sources import SourceInfo

FORMAT_VERSION = 1

BLOCK_COLUMNS = ("file", "start", "nbytes", "rows", "skip", "take")


class BlockFacts(NamedTuple):
    """What all rows of a block have in common. `columns`: (standard name, name in the file) of those that are read;
    `number`: the block's in its file; `first_row`: number in the file of the block's first row; `skip`: rows before the
    first used one."""

    source: int
    info: SourceInfo
    columns: tuple[tuple[str, str], ...]
    url: str
    number: int
    first_row: int
    skip: int

    def row_id(self, row: int) -> RowId:
        """The name in reports and errors of a used row."""
        row += self.skip
        in_file = None if self.first_row == UNKNOWN_ROWS else self.first_row + row
        return RowId(self.info.name, self.url, row, self.number, in_file)


@dataclass(frozen=True)
class Index:
    """Files [files] and blocks [blocks] of the sources. Blocks of a file, and files of a source, are consecutive.

    `file_source`: source of a file; `file_kind`: its format's name. `block_rows` is `UNKNOWN_ROWS` where only
    reading tells. Of a block the rows [skip, skip + take) are used; `block_take` is `ALL_ROWS` where nothing is left
    out, and 0 for a block that no row is used of.
    """

    sources: tuple[SourceInfo, ...]
    files: tuple[FileInfo, ...]
    file_kind: tuple[str, ...]
    file_source: Int64s
    block_file: Int64s
    block_start: Int64s
    block_bytes: Int64s
    block_rows: Int64s
    block_skip: Int64s
    block_take: Int64s

    @property
    def num_blocks(self) -> int:
        """Blocks of all sources."""
        return len(self.block_file)

    @cached_property
    def digest(self) -> str:
        """Differs when any file or its content does."""
        digest = hashlib.blake2b(digest_size=6)
        for file in self.files:
            digest.update(f"{file.url}\n{file.size}\n{file.etag}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def block_source(self) -> Int64s:
        """Source of each block."""
        return self.file_source[self.block_file]

    @cached_property
    def first_block(self) -> Int64s:
        """First block of each file."""
        return np.searchsorted(self.block_file, np.arange(len(self.files)))

    @cached_property
    def first_row(self) -> Int64s:
        """Number within its file of each block's first row; `UNKNOWN_ROWS` where only reading tells."""
        unknown = self.block_rows == UNKNOWN_ROWS
        first = self.first_block[self.block_file]
        rows, gaps = (_before(values) for values in (np.where(unknown, 0, self.block_rows), unknown))
        return np.where(gaps - gaps[first] > 0, UNKNOWN_ROWS, rows - rows[first])

    @cached_property
    def order_bytes(self) -> Int64s:
        """Bytes that a block counts for in the order: those of its used rows."""
        shares = self.block_bytes * np.maximum(self.block_take, 0) // np.maximum(self.block_rows, 1)
        return np.where(self.block_take == ALL_ROWS, self.block_bytes, np.maximum(shares, 1))

    @cached_property
    def used_blocks(self) -> Int64s:
        """The blocks that rows are used of."""
        return np.flatnonzero(self.block_take != 0)

    def num_rows(self, source: int) -> int | None:
        """Used rows of a source, where they can be told without reading."""
        rows = np.where(self.block_take == ALL_ROWS, self.block_rows, self.block_take)[self.block_source == source]
        return None if (rows == UNKNOWN_ROWS).any() else int(rows.sum())

    def address(self, block: int) -> BlockAddress:
        """Where a block lies."""
        file = int(self.block_file[block])
        return BlockAddress(
            self.files[file],
            block - int(self.first_block[file]),
            int(self.block_start[block]),
            int(self.block_bytes[block]),
            self.sources[int(self.file_source[file])].file_columns,
        )

    def kind(self, block: int) -> str:
        """The format of a block's file."""
        return self.file_kind[int(self.block_file[block])]

    def read_block(self, block: int) -> Block:
        """Read and decode a block: its used rows. Raises UserError that names a damaged file."""
        return self.used_rows(block, self.read_whole(block))

    def read_whole(self, block: int) -> Block:
        """Read and decode a block: all its rows."""
        return FORMATS[self.kind(block)].read(self.address(block))

    def read_run(self, blocks: Sequence[int]) -> list[Block]:
        """The same of blocks of one file, in as few reads as pay; for formats that can."""
        read = FORMATS[self.kind(blocks[0])].read_run
        assert read is not None
        return read([self.address(block) for block in blocks])

    def used_rows(self, block: int, whole: Block) -> Block:
        """Those of its rows that are used."""
        take = int(self.block_take[block])
        return whole if take == ALL_ROWS else RowRange(whole, int(self.block_skip[block]), take)

    def facts(self, block: int) -> BlockFacts:
        """What all rows of a block have in common."""
        file = int(self.block_file[block])
        info = self.sources[int(self.file_source[file])]
        return BlockFacts(
            int(self.file_source[file]),
            info,
            info.named_columns,
            self.files[file].url,
            block - int(self.first_block[file]),
            int(self.first_row[block]),
            int(self.block_skip[block]),
        )

    def row_id(self, block: int, row: int) -> RowId:
        """The name in reports and errors of a used row."""
        return self.facts(block).row_id(row)

    def place(self, block: int, row: int, decoded: Block) -> str:
        """The same for the row of an error, with its line in the file where the format has lines."""
        row_id = self.row_id(block, row)
        line = decoded.line(row)
        return str(row_id) if line is None else f"{row_id.source}: {row_id.file}, line {line}"

    def scan_of(self, file: int) -> Scan:
        """What scanning a file found; its columns are not kept."""
        first, last = np.searchsorted(self.block_file, [file, file + 1])
        return Scan(self.block_start[first:last], self.block_bytes[first:last], self.block_rows[first:last], None)

    def select(self, source: int) -> Index:
        """The part of one source."""
        files = np.flatnonzero(self.file_source == source)
        blocks = np.flatnonzero(self.block_source == source)
        return Index(
            (self.sources[source],),
            tuple(self.files[file] for file in files),
            tuple(self.file_kind[file] for file in files),
            np.zeros(len(files), np.int64),
            np.searchsorted(files, self.block_file[blocks]),
            self.block_start[blocks],
            self.block_bytes[blocks],
            self.block_rows[blocks],
            self.block_skip[blocks],
            self.block_take[blocks],
        )

    def with_options(self, sources: Sequence[Source]) -> Index:
        """The same files, read with the storage options that the sources have now."""
        options = [storage.options_text(source.storage_options) for source in sources]
        if options == [info.options for info in self.sources]:
            return self
        infos = tuple(info._replace(options=now) for info, now in zip(self.sources, options, strict=True))
        numbers = self.file_source.tolist()
        files = tuple(replace(file, options=options[one]) for file, one in zip(self.files, numbers, strict=True))
        return replace(self, sources=infos, files=files)

    def save(self, folder: str, prefix: str) -> None:
        """Write FOLDER/PREFIX.files.parquet and FOLDER/PREFIX.blocks.parquet."""
        import pyarrow as pa

        sources = json.dumps([source._asdict() for source in self.sources])
        files = pa.table(
            {
                "url": [file.url for file in self.files],
                "size": pa.array([file.size for file in self.files], pa.int64()),
                "etag": [file.etag for file in self.files],
                "kind": list(self.file_kind),
                "source": self.file_source,
            }
        ).replace_schema_metadata({"ftlaunch.sources": sources, "ftlaunch.version": str(FORMAT_VERSION)})
        columns = (
            self.block_file, self.block_start, self.block_bytes, self.block_rows, self.block_skip, self.block_take,
        )  # fmt: skip
        blocks = pa.table(dict(zip(BLOCK_COLUMNS, columns, strict=True)))
        for name, table in (("files", files), ("blocks", blocks)):
            storage.write_bytes(storage.join(folder, f"{prefix}.{name}.parquet"), _to_parquet(table))

    @classmethod
    def load(cls, folder: str, prefix: str) -> Index:
        """Read what `save` wrote."""
        files, blocks = (
            _Columns(storage.read_bytes(storage.join(folder, f"{prefix}.{name}.parquet")))
            for name in ("files", "blocks")
        )
        sources = [SourceInfo(**source) for source in json.loads(files.metadata[b"ftlaunch.sources"])]
        numbers = files.array("source")
        options = (sources[number].options for number in numbers.tolist())
        return cls(
            tuple(sources),
            tuple(map(FileInfo, files.texts("url"), files.array("size").tolist(), files.texts("etag"), options)),
            tuple(map(sys.intern, files.texts("kind"))),
            numbers,
            *(blocks.array(name) for name in BLOCK_COLUMNS),
        )


def _before(values: Int64s) -> Int64s:
    """Sum of what stands in front of each."""
    sums = np.cumsum(values)
    return sums - values


def _to_parquet(table: Any) -> bytes:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


class _Columns:
    """A parquet file whose columns are read one at a time: an index of 10^6 blocks is never in memory twice."""

    def __init__(self, data: bytes) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(pa.BufferReader(data))
        self.metadata: dict[bytes, bytes] = self._file.schema_arrow.metadata

    def array(self, name: str) -> Int64s:
        """A column of numbers."""
        return np.array(self._column(name), np.int64)

    def texts(self, name: str) -> list[str]:
        """A column of text."""
        texts: list[str] = self._column(name).to_pylist()
        return texts

    def _column(self, name: str) -> Any:
        return self._file.read(columns=[name], use_threads=False).column(name)
