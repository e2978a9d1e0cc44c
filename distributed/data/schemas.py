"""A source's row format, settled from what its files show, and files that do not belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...recipes.errors import UserError
from ...recipes.formats import detect_format, require_columns, standard_columns
from ...recipes.schema import Source
from .. import storage
from ..storage import FileInfo
from .block import BlockAddress, Scan
from .formats import FORMATS
from .kinds import NOTHING, kinds_of_row
from .sources import SourceInfo


class Scanned(NamedTuple):
    """A file of a source, the name of its format, and what its scan found."""

    file: FileInfo
    kind: str
    scan: Scan


def settle(source: Source, name: str, scanned: Sequence[Scanned]) -> SourceInfo:
    """A source's row format. Raises UserError for files without rows, without a needed column, or with columns of
    another kind than the others have."""
    if all((one.scan.rows == 0).all() for one in scanned):
        raise UserError(f"source {name}: its {len(scanned)} files hold no rows at all ({scanned[0].file.url} ...)")
    known = [(one.file.url, one.scan.columns) for one in scanned if one.scan.columns is not None]
    row_format = source.format
    if row_format is None:
        where, columns = known[0] if known else (scanned[0].file.url, _columns_by_reading(scanned[0]))
        row_format = detect_format(columns, source.columns, f"source {name} ({where})")
    for url, columns in known:
        require_columns(columns, row_format, source.columns, url)
    needed = [source.columns.get(column, column) for column in standard_columns(row_format)]
    for column in needed:
        _must_agree(column, known, name)
    return SourceInfo(name, row_format, dict(source.columns), storage.options_text(source.storage_options))


def _must_agree(column: str, files: Sequence[tuple[str, Mapping[str, str]]], name: str) -> None:
    """One kind of value per column, in all files."""
    first = ("", NOTHING)
    for url, columns in files:
        kind = columns.get(column, NOTHING)
        if NOTHING in (kind, first[1]):
            first = (url, kind) if first[1] == NOTHING else first
        elif kind != first[1]:
            raise UserError(
                f"source {name}: column '{column}' is {first[1]} in {first[0]} and {kind} in {url}. Write the files "
                "alike, or make them two sources."
            )


def _columns_by_reading(scanned: Scanned) -> dict[str, str]:
    file, kind, scan = scanned
    block = FORMATS[kind].read(BlockAddress(file, 0, int(scan.starts[0]), int(scan.nbytes[0]), None))
    if block.num_rows == 0:
        raise UserError(f"{file.url}: no rows, so its format cannot be told. Say it with `format:`.")
    return kinds_of_row(block.row(0))
