"""File formats by name, and the cache of decoded blocks that the streams of a rank share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ..storage import FileInfo
from . import columnar, jsonl
from .block import Block, BlockAddress, Scan


class FileFormat(NamedTuple):
    """How a kind of file is scanned at index time and read later."""

    scan: Callable[[FileInfo], Scan]
    read: Callable[[BlockAddress], Block]


_GZIP = FileFormat(partial(jsonl.scan_compressed, method="gzip"), partial(jsonl.read_compressed, method="gzip"))
_ZSTD = FileFormat(partial(jsonl.scan_compressed, method="zstd"), partial(jsonl.read_compressed, method="zstd"))

FORMATS: dict[str, FileFormat] = {
    "parquet": FileFormat(columnar.scan_parquet, columnar.read_parquet),
    "jsonl": FileFormat(jsonl.scan_plain, jsonl.read_plain),
    "jsonl.gz": _GZIP,
    "jsonl.zst": _ZSTD,
    "arrow": FileFormat(columnar.scan_arrow, columnar.read_arrow),
}

SUFFIXES: dict[str, str] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".ndjson.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".ndjson.zst": "jsonl.zst",
    ".arrow": "arrow",
    ".feather": "arrow",
}


def kind_of(url: str) -> str | None:
    """The format that a file's name says; None: no known one. A query string (`?versionId=`) is not the name."""
    name = url.split("?", maxsplit=1)[0].lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)
