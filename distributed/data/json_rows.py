"""JSON files that are no JSON lines: an array of objects, or objects one after the other. A file is one block.

The file stays in memory as text with the place of every row; a row becomes Python objects only when it is asked for.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping
from typing import Any

from ...recipes.errors import UserError
from .. import storage
from ..storage import FileInfo
from . import lines
from .block import Block, BlockAddress, Scan
from .kinds import kinds_of_row
from .whole import one_block

_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class JsonBlock:
    """Rows by where they begin in a text."""

    def __init__(self, text: str, starts: array[int], url: str) -> None:
        self._text = text
        self._starts = starts
        self._url = url
        self.num_rows = len(starts)
        self.memory_bytes = 2 * len(text) + 8 * len(starts)

    def row(self, number: int) -> dict[str, Any]:
        """Parse one row."""
        row = _DECODER.raw_decode(self._text, self._starts[number])[0]
        if not isinstance(row, dict):
            raise UserError(
                f"{self._url}, line {self.line(number)}: a row is a JSON object, not a {type(row).__name__}"
            )
        return row

    def line(self, number: int) -> int:
        """The line in which the row begins."""
        return self._text.count("\n", 0, self._starts[number]) + 1


def parse(data: bytes, address: BlockAddress) -> Block:
    """All rows of a file. Raises UserError (file, line) for text that is no JSON."""
    url = address.file.url
    text = _decoded(data, url)
    try:
        return JsonBlock(text, _row_starts(text), url)
    except json.JSONDecodeError as error:
        excerpt = text[max(0, error.pos - 20) : error.pos + 60]
        raise UserError(f"{url}, line {error.lineno}: not valid JSON ({error.msg}): {excerpt!r}") from error
    except RecursionError as error:
        raise UserError(f"{url}: not valid JSON (nested too deeply)") from error


def _decoded(data: bytes, url: str) -> str:
    try:
        return data.removeprefix(lines.BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{url}, line {line}: not valid UTF-8 (byte {error.start} of the file)") from error


def _row_starts(text: str) -> array[int]:
    """Where rows begin. Every row is parsed once to find its end, and forgotten."""
    starts = array("q")
    at = _skip(text, 0)
    in_array = text.startswith("[", at)
    at = _skip(text, at + 1) if in_array else at
    while at < len(text) and not (in_array and text[at] == "]"):
        if in_array and len(starts):
            at = _after_comma(text, at)
        _, end = _DECODER.raw_decode(text, at)
        starts.append(at)
        at = _skip(text, end)
    if in_array:
        _must_end(text, at)
    return starts


def _after_comma(text: str, at: int) -> int:
    if text[at] != ",":
        raise json.JSONDecodeError("Expecting ',' between rows", text, at)
    return _skip(text, at + 1)


def _must_end(text: str, at: int) -> None:
    if at >= len(text):
        raise json.JSONDecodeError("The array does not end: the file is cut off", text, at)
    rest = _skip(text, at + 1)
    if rest < len(text):
        raise json.JSONDecodeError("Something follows the array", text, rest)


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def scan(file: FileInfo) -> Scan:
    """One block; columns are those of the first row, if it ends within the head."""
    data = storage.read_file(file, 0, min(lines.HEAD_BYTES, file.size))
    return one_block(file, _first_columns(data.removeprefix(lines.BOM).decode("utf-8", "replace")))


def _first_columns(head: str) -> Mapping[str, str] | None:
    at = _skip(head, 0)
    at = _skip(head, at + 1) if head.startswith("[", at) else at
    try:
        row, _ = _DECODER.raw_decode(head, at)
    except (json.JSONDecodeError, RecursionError):
        return None
    return kinds_of_row(row) if isinstance(row, dict) else None
