"""JSON lines, plain (a block is a byte range) or compressed (a file is a block)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ...recipes.errors import UserError
from ..storage import FileInfo
from . import lines
from .block import Block, BlockAddress, Scan
from .kinds import kinds_of_row

EXCERPT_CHARACTERS = 80


class JsonlBlock:
    """Lines of a file; `offset` is where `data` begins in the (decompressed) file."""

    def __init__(self, data: bytes, offset: int, newlines_before: Callable[[int], int], url: str) -> None:
        """`newlines_before(offset)`: of the file; asked only to name a broken line."""
        self._lines: list[bytes] = []
        self._offsets: list[int] = []
        self._newlines_before = newlines_before
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
        line = self._lines[number].removeprefix(lines.BOM)
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self._broken(number, f"not valid UTF-8 (byte {error.start} of the line)") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise self._broken(number, f"not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise self._broken(number, f"a row is a JSON object, not a {type(row).__name__}")
        return row

    def line(self, number: int) -> int:
        """The row's line in the file."""
        return self._newlines_before(self._offsets[number]) + 1

    def _broken(self, number: int, what: str) -> UserError:
        excerpt = self._lines[number][: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")[:EXCERPT_CHARACTERS]
        return UserError(f"{self._url}, line {self.line(number)}: {what}: {excerpt!r}")


def scan(file: FileInfo, block_bytes: int = lines.BLOCK_BYTES) -> Scan:
    """Byte ranges of `block_bytes`; only the head is read, for the columns."""
    return Scan(*lines.ranges(file, block_bytes), _first_columns(lines.head(file), file.url))


def _first_columns(head: bytes, url: str) -> Mapping[str, str] | None:
    """Columns of the first row; a line that the head cuts off is not looked at unless it is the only one."""
    stripped = head.removeprefix(lines.BOM).lstrip()
    if not stripped:
        return None
    line, _, _ = stripped.partition(b"\n")
    skipped = head[: len(head) - len(stripped)].count(b"\n")
    return kinds_of_row(JsonlBlock(line, 0, lambda _: skipped, url).row(0))


def read(address: BlockAddress) -> Block:
    """The rows that start in a byte range."""
    data, offset = lines.lines_of(address)
    return JsonlBlock(data, offset, lambda at: lines.newlines_before(address.file, at), address.file.url)


def parse(data: bytes, address: BlockAddress) -> Block:
    """All rows of a file that was read whole."""
    return JsonlBlock(data, 0, lambda at: data.count(b"\n", 0, at), address.file.url)
