"""JSON lines, plain (a block is a byte range) or compressed (a file is a block)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...recipes.errors import UserError
from ..storage import FileInfo
from . import lines
from .block import Block, BlockAddress, Scan
from .kinds import kinds_of_row

EXCERPT_CHARACTERS = 80


class JsonlBlock:
    """Lines of a file."""

    def __init__(
        self, rows: Sequence[bytes], numbers: Sequence[int], lines_before: Callable[[], int], url: str, nbytes: int
    ) -> None:
        """`numbers`: of the rows' lines, from 0 at the block's beginning. `lines_before`: in front of the block; asked
        only to name a broken line."""
        self.rows = rows
        self.numbers = numbers
        self.num_rows = len(rows)
        self.memory_bytes = nbytes + 64 * len(rows)
        self._lines_before = lines_before
        self._url = url

    def row(self, number: int) -> dict[str, Any]:
        """Parse one line."""
        line = self.rows[number].removeprefix(lines.BOM)
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
        return self._lines_before() + self.numbers[number] + 1

    def _broken(self, number: int, what: str) -> UserError:
        excerpt = self.rows[number][: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")[:EXCERPT_CHARACTERS]
        return UserError(f"{self._url}, line {self.line(number)}: {what}: {excerpt!r}")


def _block(data: bytes, lines_before: Callable[[], int], url: str) -> JsonlBlock:
    """The lines that are not blank."""
    numbered = [(number, line) for number, line in enumerate(data.split(b"\n")) if line and not line.isspace()]
    rows, numbers = [line for _, line in numbered], [number for number, _ in numbered]
    return JsonlBlock(rows, numbers, lines_before, url, len(data))


class _Column(Sequence[Any]):
    """A column of a table, whose values are made when they are asked for."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, number: Any) -> Any:
        return self._column[number].as_py()


def freeze(block: JsonlBlock) -> Any:
    """A block as a table."""
    import pyarrow as pa

    return pa.table({"line": pa.array(block.rows, pa.large_binary()), "number": pa.array(block.numbers, pa.int64())})


def thaw(table: Any, address: BlockAddress) -> Block:
    """The block of such a table, which is a whole file."""
    return _thawed(table, lambda: 0, address)


def thaw_range(table: Any, address: BlockAddress) -> Block:
    """The block of such a table, which is a byte range of a file; where it begins is only looked up for an error."""
    return _thawed(table, lambda: lines.newlines_before(address.file, lines.lines_of(address)[1]), address)


def _thawed(table: Any, lines_before: Callable[[], int], address: BlockAddress) -> Block:
    rows, numbers = (_Column(table.column(name)) for name in ("line", "number"))
    return JsonlBlock(rows, numbers, lines_before, address.file.url, 0)


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
    return kinds_of_row(JsonlBlock([line], [0], lambda: skipped, url, len(line)).row(0))


def read(address: BlockAddress) -> Block:
    """The rows that start in a byte range."""
    data, offset = lines.lines_of(address)
    return _block(data, lambda: lines.newlines_before(address.file, offset), address.file.url)


def parse(data: bytes, address: BlockAddress) -> Block:
    """All rows of a file that was read whole."""
    return _block(data, lambda: 0, address.file.url)
