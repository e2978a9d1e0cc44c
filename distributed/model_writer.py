"""Writing a stream of weights as safetensors files, one after the other, with a checksum for every span of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import IO

import torch

from . import storage
from .checkpoint.layout import StoredFile
from .checkpoint.manifest import FileRecord, Span
from .merging import TensorStream, cast

SPAN_BYTES = 4 * 2**20

Advance = Callable[[int], None]
"""Takes the bytes that were written since it was last called."""


class SpanWriter:
    """Hands bytes on to a file, and keeps their checksums."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._spans: list[Span] = []
        self._begin = self._at = self._checksum = 0

    def write(self, data: memoryview | bytes) -> None:
        """Append."""
        view = memoryview(data)
        for start in range(0, len(view), SPAN_BYTES):
            piece = view[start : start + SPAN_BYTES]
            self._out.write(piece)
            self._checksum = zlib.crc32(piece, self._checksum)
            self._at += len(piece)
            if self._at - self._begin >= SPAN_BYTES:
                self._end_span()

    def _end_span(self) -> None:
        if self._at > self._begin:
            self._spans.append(Span(self._begin, self._at - self._begin, self._checksum))
        self._begin, self._checksum = self._at, 0

    def record(self, path: str) -> FileRecord:
        """What was written, when all is."""
        self._end_span()
        return FileRecord(path, self._at, tuple(self._spans))


def write_weights(folder: str, file: StoredFile, tensors: TensorStream, advance: Advance) -> FileRecord:
    """One file of a folder; it appears when all of it is written. Holds a block of one tensor at a time.

    Raises DamagedError for what cannot be read as it was written, UserError and InfrastructureError.
    """
    with storage.open_write(storage.join(folder, file.name)) as out:
        spans = SpanWriter(out)
        spans.write(file.header)
        for tensor in file.tensors:
            for block in tensors.blocks(tensor.spec.name):
                data = cast(block, tensor.spec).contiguous().view(torch.uint8).numpy()
                spans.write(data.data)
                advance(data.nbytes)
        record = spans.record(file.name)
        if record.size != file.size:
            raise RuntimeError(f"{file.name}: {record.size} bytes were written, {file.size} were planned")
    return record
