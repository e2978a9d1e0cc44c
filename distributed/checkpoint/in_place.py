"""Write one part of a checkpoint when all ranks are on one host and see the same local folder: each writes its ranges
into files that have their full size already. No byte passes between ranks.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .. import storage
from .exchange import chunks, intersect
from .layout import StoredFile
from .manifest import FileRecord
from .parts import Held, Part, PartPlan, as_planned
from .peers import Peers
from .spans import Piece, records_of

THREADS = 2
"""One writes while the other computes a checksum; more would take cores from the other ranks."""

PENDING_WRITES = 6
"""Chunks on their way; those that had to be cast or copied from a device are memory of their own."""

OPEN_FILES = 64
"""Files held open; tensors next to each other go to a few files in turn."""


def save_in_place(parts: Sequence[Part], peers: Peers) -> dict[str, list[FileRecord]]:
    """Write the parts' files into local folders; collective. Returns the records of the files that this rank has made,
    by stem. If any rank fails, all ranks raise: the failing one its own error, the others UserError or
    InfrastructureError."""
    return {part.plan.files.stem: _save_part(part, peers) for part in parts}


def _save_part(part: Part, peers: Peers) -> list[FileRecord]:
    plan, directory = part.plan, part.directory
    owned = plan.owned()
    with peers.together(f"making room for {plan.files.stem}"):
        for file in owned:
            storage.make_file(storage.join(directory, file.name), file.size)
    with peers.together(f"writing {plan.files.stem}"):
        with _Ranges(directory) as ranges:
            for file in owned:
                ranges.write(file, 0, torch.frombuffer(bytearray(file.header), dtype=torch.uint8))
            for position, fragment in enumerate(as_planned(part.source, plan)):
                _write_tensor(Held(fragment), position, plan, ranges)
        if owned:
            storage.sync_folder(directory)
    pieces = [piece for ranks in peers.gather(ranges.pieces) for piece in ranks]
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
