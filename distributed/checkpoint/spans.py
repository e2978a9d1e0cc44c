"""The manifest's spans from what ranks have written: those that a single writer would have, whoever wrote the bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from .crc import combine_crc32
from .exchange import chunks
from .layout import DTYPES, StoredFile
from .manifest import FileRecord, Span


class Piece(NamedTuple):
    """Bytes [offset, offset + length) of a file that one rank has written."""

    file: str
    offset: int
    length: int
    crc32: int


def records_of(files: Iterable[StoredFile], pieces: Iterable[Piece], chunk_bytes: int) -> Iterator[FileRecord]:
    """The records of these files, from what all ranks have written of them."""
    by_file = {name: list(group) for name, group in groupby(sorted(pieces), key=lambda piece: piece.file)}
    for file in files:
        yield FileRecord(file.name, file.size, tuple(_spans(file, by_file.get(file.name, []), chunk_bytes)))


def _spans(file: StoredFile, pieces: Iterable[Piece], chunk_bytes: int) -> Iterator[Span]:
    """The header is one span, and so is each chunk of a tensor, whoever wrote it."""
    waiting = deque(pieces)
    for start, stop in _bounds(file, chunk_bytes):
        crc32, end = 0, start
        while end < stop:
            piece = waiting.popleft()
            assert piece.offset == end, f"{file.name}: {piece} was written, bytes from {end} on were not"
            crc32, end = combine_crc32(crc32, piece.crc32, piece.length), end + piece.length
        yield Span(start, stop - start, crc32)


def _bounds(file: StoredFile, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    yield 0, len(file.header)
    for tensor in file.tensors:
        size = DTYPES[tensor.spec.dtype].itemsize
        for start, stop in chunks(tensor.spec, chunk_bytes):
            yield tensor.start + start * size, tensor.start + stop * size
