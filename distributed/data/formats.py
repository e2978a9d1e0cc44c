"""The table of file formats: what a file's name says, how such a file is cut into blocks, and how a block is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..storage import FileInfo
from . import arrow_ipc, columnar, csv_rows, json_rows, jsonl, text_files, whole
from .block import Block, BlockAddress, Scan


class Frozen(NamedTuple):
    """How decoded blocks become Arrow tables, and such tables, mapped from disk, blocks again."""

    freeze: Callable[[Any], Any]
    thaw: Callable[[Any, BlockAddress], Block]


class FileFormat(NamedTuple):
    """How a kind of file is scanned at index time and read later; `frozen`: of formats whose blocks a node's
    processes can share."""

    scan: Callable[[FileInfo], Scan]
    read: Callable[[BlockAddress], Block]
    frozen: Frozen | None = None
    require_to_fit: Callable[[BlockAddress], None] | None = None
    """Raises UserError for a block that memory does not hold, where that can be told without reading it."""
    read_run: Callable[[Sequence[BlockAddress]], list[Block]] | None = None
    """Of formats whose small neighbouring blocks one read can bring."""


_TABLE = Frozen(columnar.freeze, columnar.thaw)
_LINES = Frozen(jsonl.freeze, jsonl.thaw)
_FROZEN: dict[str, Frozen] = {"jsonl": _LINES, "csv": _TABLE, "tsv": _TABLE}


_PARSERS: dict[str, whole.Parse] = {
    "jsonl": jsonl.parse,
    "json": json_rows.parse,
    "csv": partial(csv_rows.parse, delimiter=","),
    "tsv": partial(csv_rows.parse, delimiter="\t"),
    "text": text_files.parse,
}
"""Formats that may be compressed: from a whole file's bytes to its rows."""

_COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}

FORMATS: dict[str, FileFormat] = {
    "parquet": FileFormat(
        columnar.scan_parquet, columnar.read_parquet, _TABLE, columnar.require_to_fit, columnar.read_row_groups
    ),
    "arrow": FileFormat(arrow_ipc.scan, arrow_ipc.read, _TABLE),
    "jsonl": FileFormat(jsonl.scan, jsonl.read, Frozen(jsonl.freeze, jsonl.thaw_range)),
    "json": FileFormat(json_rows.scan, partial(whole.read_plain, parse=_PARSERS["json"])),
    "csv": FileFormat(partial(csv_rows.scan, delimiter=","), partial(whole.read_plain, parse=_PARSERS["csv"]), _TABLE),
    "tsv": FileFormat(partial(csv_rows.scan, delimiter="\t"), partial(whole.read_plain, parse=_PARSERS["tsv"]), _TABLE),
    "text": FileFormat(text_files.scan, text_files.read),
    **{
        f"{kind}.{suffix}": FileFormat(
            whole.scan_compressed, partial(whole.read_compressed, parse=parse, method=method), _FROZEN.get(kind)
        )
        for kind, parse in _PARSERS.items()
        for suffix, method in _COMPRESSIONS.items()
    },
}

_NAMES: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather"),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "json": (".json",),
    "text": (".txt", ".md"),
}
"""How names of files end that are not compressed."""

SUFFIXES: dict[str, str] = {
    **{name: kind for kind, names in _NAMES.items() for name in names},
    **{
        f"{name}.{compression}": f"{kind}.{compression}"
        for kind in _PARSERS
        for name in _NAMES[kind]
        for compression in _COMPRESSIONS
    },
}
"""How the names of data files end -> format."""

TIERS: tuple[frozenset[str], ...] = (
    frozenset({"parquet", "arrow", "jsonl", "csv", "tsv"}),
    frozenset({"json"}),
    frozenset({"text"}),
)
"""What a folder is taken to hold: the first of these that is there. Beside tables lie README.md and
dataset_info.json, which are no data; a glob names files of any kind."""


def kind_of(url: str) -> str | None:
    """The format that a file's name says; None: no known one. A query string (`?versionId=`) is not the name."""
    name = url.split("?", maxsplit=1)[0].lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def of_first_tier(files: list[FileInfo]) -> list[FileInfo]:
    """Of a folder's files, those that are its data; see `TIERS`."""
    kinds = [(kind_of(file.url) or "").partition(".")[0] for file in files]
    tiers = ([file for file, kind in zip(files, kinds, strict=True) if kind in tier] for tier in TIERS)
    return next((tier for tier in tiers if tier), [])
