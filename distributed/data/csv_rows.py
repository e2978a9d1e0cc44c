"""CSV and TSV: a header line, then rows whose values are all text. A file is one block, because a quoted value may hold
newlines: no place but the beginning tells where a row begins."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from ...recipes.errors import UserError
from ..storage import FileInfo
from . import lines
from .block import Block, BlockAddress, Scan
from .columnar import ArrowBlock, wanted_columns
from .whole import one_block


def scan(file: FileInfo, delimiter: str) -> Scan:
    """One block; the columns are those of the header."""
    return one_block(file, _kinds(_header(lines.head(file), delimiter, file.url)))


def _kinds(names: Sequence[str]) -> Mapping[str, str] | None:
    return dict.fromkeys(names, "text") if names else None


def _header(head: bytes, delimiter: str, url: str) -> list[str]:
    """Column names. Raises UserError for a header with a name twice or without one."""
    text = head.removeprefix(lines.BOM).decode("utf-8", "replace")
    names = next((row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row), [])
    if len(set(names)) < len(names) or "" in names:
        shown = ", ".join(repr(name) for name in names[:10])
        raise UserError(
            f"{url}, line 1: the header must name every column, each once; it has {shown}. "
            "A CSV file begins with a line of column names."
        )
    return names


def parse(data: bytes, address: BlockAddress, delimiter: str) -> Block:
    """All rows of a file; needed columns only. Raises UserError that names the row or line."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    url = address.file.url
    names = _header(data[: lines.HEAD_BYTES], delimiter, url)
    wanted = wanted_columns(address, names)
    convert = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.large_string()), include_columns=list(wanted), strings_can_be_null=False
    )
    # A value may be as long as the file, and no value may be longer than what is parsed at a time.
    read = arrow_csv.ReadOptions(use_threads=False, block_size=min(max(len(data), 2), 2**31 - 1))
    layout = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        table = arrow_csv.read_csv(pa.BufferReader(data), read, layout, convert)
    except pa.ArrowInvalid as error:
        raise _broken(data, url, str(error)) from error
    return ArrowBlock(table)


def _broken(data: bytes, url: str, what: str) -> UserError:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return UserError(f"{url}, line {line}: not valid UTF-8 (byte {error.start} of the file)")
    return UserError(f"{url}: {what}. Values that hold the delimiter or a newline must be quoted.")
