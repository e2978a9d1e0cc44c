"""Text files: a file is a document.

A file of more than one block is read in parts that end with a line, so that a corpus in one file needs no memory for
all of it; each part is a document of its own, which costs one end-of-sequence token a part.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ...recipes.errors import UserError
from ..storage import FileInfo
from . import lines
from .block import Block, BlockAddress, Scan


class TextBlock:
    """Documents, still as bytes."""

    def __init__(self, parts: list[bytes], newlines_before: Callable[[int], int], url: str) -> None:
        """`newlines_before(number)`: in front of a part; asked only to name a place."""
        self._parts = parts
        self._newlines_before = newlines_before
        self._url = url
        self.num_rows = len(parts)
        self.memory_bytes = sum(map(len, parts))

    def row(self, number: int) -> dict[str, Any]:
        """One document. Raises UserError (file, line) for what is no UTF-8."""
        part = self._parts[number]
        try:
            return {"text": part.removeprefix(lines.BOM).decode("utf-8")}
        except UnicodeDecodeError as error:
            line = self.line(number) + part.count(b"\n", 0, error.start)
            raise UserError(f"{self._url}, line {line}: not valid UTF-8. Write the file again as UTF-8.") from error

    def line(self, number: int) -> int:
        """The line with which the document begins."""
        return self._newlines_before(number) + 1


def scan(file: FileInfo) -> Scan:
    """Byte ranges; nothing is read."""
    return Scan(*lines.ranges(file, lines.BLOCK_BYTES), {"text": "text"})


def read(address: BlockAddress) -> Block:
    """The lines that start in a byte range, as one document."""
    data, offset = lines.lines_of(address)
    parts = [data] if data else []
    return TextBlock(parts, lambda _: lines.newlines_before(address.file, offset), address.file.url)


def parse(data: bytes, address: BlockAddress) -> Block:
    """The documents of a file that was read whole."""
    starts = [0]
    while starts[-1] < len(data):
        starts.append(data.find(b"\n", starts[-1] + lines.BLOCK_BYTES - 1) + 1 or len(data))
    parts = [data[start:stop] for start, stop in pairwise(starts)]
    return TextBlock(parts, lambda number: data.count(b"\n", 0, starts[number]), address.file.url)
