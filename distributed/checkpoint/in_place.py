"""Write one part of a checkpoint when all ranks are on one host and see the same local folder: each writes its ranges
into files that have their full size already. No byte passes between ranks.

Spans are those that a single writer would have: where ranks share one, their checksums are combined.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import torch

from .. import storage
from .crc import combine_crc32
from .exchange import chunks, intersect
from .layout import DTYPES, StoredFile
from .manifest import FileRecord, Span
from .parts import Held, PartPlan, Source, as_planned
from .peers import Peers

THREADS = 2
"""One writes while the other computes a checksum; more would take cores from the other ranks."""

PENDING_WRITES = 6
"""Chunks on their way; those that had to be cast or copied from a device are memory of their own."""

OPEN_FILES = 64
"""Files held open; tensors next to each other go to a few files in turn."""


class Piece(NamedTuple):
    """Bytes [offset, offset + length) of a file that one rank has written."""

    file: str
    offset: int
    length: int
    crc32: int


def save_part_in_place(source: Source, directory: str, plan: PartPlan, peers: Peers) -> list[FileRecord]:
    """Write the part's files into the local folder `directory`; collective. Returns the records of the files that this
    rank has made. If any rank fails, all ranks raise, as in `writer.save_part`."""
    owned = plan.owned()
    with peers.together(f"making room for {plan.files.stem}"):
        for file in owned:
            storage.make_file(storage.join(directory, file.name), file.size)
    with peers.together(f"writing {plan.files.stem}"):
        with _Ranges(directory) as ranges:
            for file in owned:
                ranges.write(file, 0, torch.frombuffer(bytearray(file.header), dtype=torch.uint8))
            for position, fragment in enumerate(as_planned(source, plan)):
                _write_tensor(Held(fragment), position, plan, ranges)
        if owned:
            storage.sync_folder(directory)
    pieces = [piece for part in peers.gather(ranges.pieces) for piece in part]
    return list(records_of(owned, pieces, plan.chunk_bytes))


def _write_tensor(held: Held, position: int, plan: PartPlan, ranges: _Ranges) -> None:
    file, place = plan.files.places[held.spec.name]
    mine = plan.supplied(position) if file.name not in plan.linked else ()
    for chunk in chunks(held.spec, plan.chunk_bytes) if mine else ():
        for start, stop in intersect(mine, *chunk):
            ranges.write(file, place.start + start * held.itemsize, held.view(start, stop))


class _Ranges:
    """Writes ranges of files, in threads, and remembers their checksums."""

    def __init__(self, directory: str) -> None:
        self.pieces: list[Piece] = []
        self._directory = directory
        self._open: OrderedDict[str, storage.RangeFile] = OrderedDict()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-writer")
        self._pending: deque[Future[Piece]] = deque()

    def __enter__(self) -> _Ranges:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)
            while self._open:
                self._open.popitem()[1].close(sync=kind is None)

    def write(self, file: StoredFile, offset: int, data: torch.Tensor) -> None:
        """Begin to write bytes; waits when storage is behind."""
        if file.name not in self._open:
            self._make_room()
            self._open[file.name] = storage.RangeFile(storage.join(self._directory, file.name))
        self._open.move_to_end(file.name)
        self._pending.append(self._threads.submit(_put, self._open[file.name], file.name, offset, data.numpy().data))
        self._wait(PENDING_WRITES)

    def _make_room(self) -> None:
        if len(self._open) >= OPEN_FILES:
            self._wait(0)
            self._open.popitem(last=False)[1].close(sync=True)

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self.pieces.append(self._pending.popleft().result())


def _put(target: storage.RangeFile, file: str, offset: int, data: memoryview) -> Piece:
    target.write(offset, data)
    return Piece(file, offset, len(data), zlib.crc32(data))


# --- spans ----------------------------------------------------------------------------------------------------------


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
