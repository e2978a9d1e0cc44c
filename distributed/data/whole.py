"""Files that can only be read from their beginning to their end: compressed ones, and formats in which no place but the
beginning tells where a row begins. Such a file is one block."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ...recipes.errors import UserError
from .. import storage
from ..storage import FileInfo
from .block import UNKNOWN_ROWS, Block, BlockAddress, Scan
from .memory import allowance, require_memory

CHUNK_BYTES = 2**22
"""Decompressed at a time, so that a file that does not fit is refused before memory is full."""

REMEDY = "Write it as parquet or plain JSON lines, which are read in parts, or as several smaller files."

Parse = Callable[[bytes, BlockAddress], Block]
"""A file's bytes, decompressed, to its rows."""


def one_block(file: FileInfo, columns: Mapping[str, str] | None) -> Scan:
    """The scan of a file that can only be read whole."""
    return Scan(np.array([0]), np.array([max(1, file.size)]), np.array([UNKNOWN_ROWS]), columns)


def scan_compressed(file: FileInfo) -> Scan:
    """One block. A compressed file can only be read from its start, so its columns are not looked at here."""
    return one_block(file, None)


def read_plain(address: BlockAddress, parse: Parse) -> Block:
    """All rows of a file. Raises UserError for one that does not fit into memory."""
    require_memory(address.file, 2 * address.file.size, "the file, which is one block,", REMEDY)
    return parse(storage.read_file(address.file, 0, address.file.size), address)


def read_compressed(address: BlockAddress, parse: Parse, method: str) -> Block:
    """All rows of a compressed file. Raises UserError for one that is cut off, or that does not fit into memory."""
    return parse(_decompressed(address.file, method), address)


def _decompressed(file: FileInfo, method: str) -> bytes:
    import zstandard

    limit = allowance()
    require_memory(file, 2 * file.size, "the compressed file, which is one block,", REMEDY, limit)
    out = io.BytesIO()
    try:
        for chunk in DECOMPRESS[method](storage.read_file(file, 0, file.size)):
            out.write(chunk)
            require_memory(file, out.tell(), "decompressed, the file, which is one block,", REMEDY, limit)
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(
            f"{file.url}: the {method} data is cut off or damaged ({error}). Write the file again."
        ) from error
    return out.getvalue()


def _gunzip(data: bytes) -> Iterator[bytes]:
    """All members of a gzip file."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _unzstd(data: bytes) -> Iterator[bytes]:
    """All frames of a zstd file. Raises EOFError when the last one is cut off."""
    import zstandard

    left = memoryview(data)
    frame = None
    while left:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        piece, left = left[:CHUNK_BYTES], left[CHUNK_BYTES:]
        yield frame.decompress(piece)
        if frame.eof:
            left = memoryview(data)[len(data) - len(left) - len(frame.unused_data) :]
            frame = None
    if frame is not None:
        raise EOFError("the last frame is cut off")


DECOMPRESS: dict[str, Callable[[bytes], Iterator[bytes]]] = {"gzip": _gunzip, "zstd": _unzstd}
