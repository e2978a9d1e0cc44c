"""What a file format gives: blocks of rows that are read whole and decoded row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..storage import FileInfo
from .order import Int64s

UNKNOWN_ROWS = -1
"""Row count of a block that is known only once it is read."""

ALL_ROWS = -1
"""Nothing is left out of a block."""


class BlockAddress(NamedTuple):
    """One block of one file: bytes [start, start + nbytes) for byte ranges, the `number`-th row group else."""

    file: FileInfo
    number: int
    start: int
    nbytes: int
    columns: tuple[str, ...] | None
    """File columns that are needed; formats that can, read only those. None: all."""


class Block(Protocol):
    """Decoded enough that any row is quickly at hand."""

    num_rows: int
    memory_bytes: int

    def row(self, number: int) -> dict[str, Any]:
        """A row with the file's column names. Raises UserError (file, line, excerpt) for a broken one."""
        ...

    def line(self, number: int) -> int | None:
        """The line of the file in which a row begins, where the format has lines; may read to find out."""
        ...


class RowRange:
    """The rows [skip, skip + take) of a block."""

    def __init__(self, block: Block, skip: int, take: int) -> None:
        self._block = block
        self._skip = skip
        self.num_rows = take
        self.memory_bytes = block.memory_bytes

    def row(self, number: int) -> dict[str, Any]:
        """A row, counted from the first that is not skipped."""
        return self._block.row(self._skip + number)

    def line(self, number: int) -> int | None:
        """Its line in the file."""
        return self._block.line(self._skip + number)


@dataclass(frozen=True)
class Scan:
    """What a file holds, found without reading its rows. Arrays are [blocks]; `columns`: name -> kind of
    value (see `kinds`); None: not looked at, or no rows to tell from."""

    starts: Int64s
    nbytes: Int64s
    rows: Int64s
    columns: Mapping[str, str] | None
