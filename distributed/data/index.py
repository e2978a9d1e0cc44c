"""The index: which files and blocks the data is made of, with what they looked like when the run began.

Nothing is converted: parquet footers are read, JSON lines are only cut into byte ranges. The index lies in the run
directory as two parquet tables, and a file whose size or etag has changed since is an error.
"""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ...recipes.errors import UserError
from ...recipes.formats import detect_format, require_columns, standard_columns
from ...recipes.methods.base import RowId
from ...recipes.schema import RowFormat, Source
from .. import storage
from ..storage import FileInfo
from . import jsonl
from .block import ALL_ROWS, UNKNOWN_ROWS, Block, BlockAddress, RowRange, Scan
from .formats import FORMATS, SUFFIXES, FileFormat, kind_of
from .order import Int64s
from .selection import rows_wanted

In = TypeVar("In")
Out = TypeVar("Out")

SCANNERS = 32
"""Files looked at at once; scanning waits for round trips."""

FORMAT_VERSION = 1

BLOCK_COLUMNS = ("file", "start", "nbytes", "rows", "skip", "take")


class SourceInfo(NamedTuple):
    """A source as the stream needs it: its rows' format, and standard -> file column names."""

    name: str
    format: RowFormat
    columns: dict[str, str]

    @property
    def file_columns(self) -> tuple[str, ...]:
        """The file's columns that are read."""
        return tuple(self.columns.get(column, column) for column in standard_columns(self.format))

    def standard_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's needed columns, as far as they are there, under their standard names."""
        named = zip(standard_columns(self.format), self.file_columns, strict=True)
        return {standard: row[column] for standard, column in named if column in row}


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
    def block_source(self) -> Int64s:
        """Source of each block."""
        return self.file_source[self.block_file]

    @cached_property
    def first_block(self) -> Int64s:
        """First block of each file."""
        return np.searchsorted(self.block_file, np.arange(len(self.files)))

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

    def read_block(self, block: int) -> Block:
        """Read and decode a block: its used rows. Raises UserError that names a damaged file."""
        whole = FORMATS[self.file_kind[int(self.block_file[block])]].read(self.address(block))
        take = int(self.block_take[block])
        return whole if take == ALL_ROWS else RowRange(whole, int(self.block_skip[block]), take)

    def row_id(self, block: int, row: int) -> RowId:
        """The name in reports and errors of a used row."""
        file = int(self.block_file[block])
        source = self.sources[int(self.file_source[file])]
        row += int(self.block_skip[block])
        return RowId(source.name, self.files[file].url, row, block - int(self.first_block[file]))

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
        files = _from_parquet(storage.read_bytes(storage.join(folder, f"{prefix}.files.parquet")))
        blocks = _from_parquet(storage.read_bytes(storage.join(folder, f"{prefix}.blocks.parquet")))
        sources = json.loads(files.schema.metadata[b"ftlaunch.sources"])
        entries = files.to_pydict()
        return cls(
            tuple(SourceInfo(**source) for source in sources),
            tuple(map(FileInfo, entries["url"], entries["size"], entries["etag"])),
            tuple(entries["kind"]),
            np.array(entries["source"], np.int64),
            *(blocks.column(name).to_numpy() for name in BLOCK_COLUMNS),
        )


def _to_parquet(table: Any) -> bytes:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _from_parquet(data: bytes) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data))


def _in_parallel(call: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    with ThreadPoolExecutor(SCANNERS, thread_name_prefix="index") as pool:
        return list(pool.map(call, items))


def build_index(sources: Sequence[Source], names: Sequence[str], *, block_bytes: int = jsonl.BLOCK_BYTES) -> Index:
    """Find the sources' files and cut them into blocks. `names`: what the sources are called in reports.

    Raises UserError: nothing found, an unknown kind of file, an empty file, a missing column, no rows at all.
    """
    formats = {**FORMATS, "jsonl": FORMATS["jsonl"]._replace(scan=partial(jsonl.scan_plain, block_bytes=block_bytes))}
    found = [_source_files(source) for source in sources]
    files = [file for group in found for file in group]
    kinds = [_kind(file) for file in files]
    scans = _in_parallel(lambda pair: _scan(formats, *pair), list(zip(files, kinds, strict=True)))
    file_source = np.repeat(np.arange(len(sources)), [len(group) for group in found])
    infos = []
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        mine = np.flatnonzero(file_source == number)
        infos.append(_source_info(source, name, [(files[i], kinds[i], scans[i]) for i in mine]))
    every = Index(
        tuple(infos),
        tuple(files),
        tuple(kinds),
        file_source,
        np.repeat(np.arange(len(files)), [len(scan.starts) for scan in scans]),
        np.concatenate([scan.starts for scan in scans]),
        np.concatenate([scan.nbytes for scan in scans]),
        np.concatenate([scan.rows for scan in scans]),
        np.zeros(sum(len(scan.starts) for scan in scans), np.int64),
        np.full(sum(len(scan.starts) for scan in scans), ALL_ROWS),
    )
    return _select_rows(every, sources)


def _select_rows(index: Index, sources: Sequence[Source]) -> Index:
    """Settle which rows are used where a source says `skip` or `take`. Raises UserError when none is left."""
    rows, skip, take = index.block_rows.copy(), index.block_skip.copy(), index.block_take.copy()
    for number, source in enumerate(sources):
        if source.skip or source.take is not None:
            blocks = np.flatnonzero(index.block_source == number)
            count = partial(_count_rows, index, blocks)
            wanted = rows_wanted(rows[blocks], count, source.skip, source.take)
            rows[blocks], skip[blocks], take[blocks] = wanted
            if not np.where(wanted.take == ALL_ROWS, wanted.rows, wanted.take).any():
                name, there = index.sources[number].name, int(wanted.rows.sum())
                raise UserError(f"source {name}: skip {source.skip} leaves nothing of its {there} rows")
    return replace(index, block_rows=rows, block_skip=skip, block_take=take)


def _count_rows(index: Index, blocks: Int64s, places: Sequence[int]) -> list[int]:
    return _in_parallel(lambda place: index.read_block(int(blocks[place])).num_rows, places)


def _scan(formats: dict[str, FileFormat], file: FileInfo, kind: str) -> Scan:
    if file.size == 0:
        raise UserError(f"{file.url}: the file is empty (0 bytes). Remove it, or write it again.")
    return formats[kind].scan(file)


def _source_files(source: Source) -> list[FileInfo]:
    paths = (source.path,) if isinstance(source.path, str) else source.path
    return [file for path in paths for file in _path_files(path)]


def _path_files(path: str) -> list[FileInfo]:
    files = storage.list_files(path, tuple(SUFFIXES))
    if files:
        return files
    raise UserError(f"{path}: no data files found. {_near(path)} Data files end in {', '.join(SUFFIXES)}.")


def _near(path: str) -> str:
    """What there is on the way to a path, in words."""
    scheme, separator, place = path.rpartition("://")
    place = place.rstrip("/")
    while place and not storage.is_folder(scheme + separator + place):
        place = posixpath.dirname(place)
    if separator and not place:
        return "No part of that path exists, the bucket neither."
    folder = scheme + separator + (place or ".")
    names = storage.list_names(folder)
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"Nearest folder: {folder}, which holds {listed or 'nothing'}."


def _kind(file: FileInfo) -> str:
    kind = kind_of(file.url)
    if kind is None:
        raise UserError(f"{file.url}: not a known kind of data file. Known: {', '.join(SUFFIXES)}.")
    return kind


def _source_info(source: Source, name: str, scanned: Sequence[tuple[FileInfo, str, Scan]]) -> SourceInfo:
    """Settle a source's row format and check every file that shows its columns."""
    if all((scan.rows == 0).all() for _, _, scan in scanned):
        raise UserError(f"source {name}: its {len(scanned)} files hold no rows at all ({scanned[0][0].url} ...)")
    first, kind, _ = scanned[0]
    known = [(file, scan.columns) for file, _, scan in scanned if scan.columns is not None]
    row_format = source.format
    if row_format is None:
        where, columns = known[0] if known else (first, _columns_by_reading(first, kind))
        row_format = detect_format(columns, source.columns, f"source {name} ({where.url})")
    for file, columns in known:
        require_columns(columns, row_format, source.columns, file.url)
    return SourceInfo(name, row_format, dict(source.columns))


def _columns_by_reading(file: FileInfo, kind: str) -> list[str]:
    block = FORMATS[kind].read(BlockAddress(file, 0, 0, file.size, None))
    if block.num_rows == 0:
        raise UserError(f"{file.url}: no rows, so its format cannot be told. Say it with `format:`.")
    return list(block.row(0))


def verify(index: Index) -> None:
    """Compare every file with what it was when the index was built. Raises UserError that names those that changed
    or vanished."""

    def problem(file: FileInfo) -> str | None:
        try:
            now = storage.info(file.url)
        except UserError as error:
            return str(error)
        if (now.size, now.etag) == (file.size, file.etag):
            return None
        return (
            f"{file.url}: changed since the run began (was {file.size} bytes, {file.etag}; is {now.size}, {now.etag})"
        )

    problems = [text for text in _in_parallel(problem, index.files) if text]
    if problems:
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            "the data is no longer what this run was started on:\n"
            + "\n".join(problems[:10])
            + more
            + "\nBring the files back, or start again on the new ones with --fresh."
        )
