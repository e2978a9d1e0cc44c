"""Write one part of a checkpoint ("model", "exp_avg", ...) as final safetensors files, all ranks at once.

Every file has one owner, which receives what others hold, chunk by chunk, and streams it out in file order. Besides
what its source yields, a rank holds a few chunks, never a tensor of somebody else and never a model.

Why it cannot deadlock: all ranks walk the same list of chunks in the same order, and waiting for a chunk depends on
earlier chunks only. Take the first chunk that is not done: its senders are kept from sending only by transfers of
earlier chunks, which are done; its owner is kept from receiving only by earlier chunks and by its own storage, which
waits for no rank. So it gets done. A rank whose source or storage failed keeps walking (it sends zeros, it drops what
it receives) until all ranks can learn of the failure together; nothing it wrote is ever committed. A rank that died
breaks its connections, which is an error on those it talks to. Their processes must end on that error (or wait for
the group's time-out), which brings it to the others.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import IO

import torch

from ...recipes.errors import InfrastructureError
from .. import storage
from .exchange import Segment, chunks, clip
from .layout import StoredFile
from .manifest import FileRecord, Span
from .parts import Held, PartPlan, Source, walk
from .peers import Peers, Transfer

PENDING_SEND_BYTES = 32 * 2**20
"""How far a rank may run ahead of the owners it sends to."""

PENDING_WRITES = 4
"""Chunks that wait for storage while the next ones are received."""


def save_part(source: Source, directory: str, plan: PartPlan, peers: Peers) -> list[FileRecord]:
    """Write the part's files into `directory`; collective. Returns the records of the files this rank wrote.

    If any rank fails, all ranks raise: the failing one its own error, the others UserError or InfrastructureError.
    """
    failures: list[Exception] = []
    with peers.together(f"writing {plan.files.stem}"):
        with _FileWriter(directory, plan.owned(), failures) as files:
            movement = _Movement(plan, peers, _Outbox(peers), files)
            for position, fragment in walk(source, plan, failures):
                movement.move(position, Held(fragment))
            movement.outbox.flush()
        if failures:
            raise failures[0]
    return files.records()


# --- one tensor -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Movement:
    """One part on its way: from those that hold it to the owners of its files."""

    plan: PartPlan
    peers: Peers
    outbox: _Outbox
    files: _FileWriter

    def move(self, position: int, held: Held) -> None:
        """Bring every chunk of a tensor to the owner of its file, and there into the file."""
        file, _ = self.plan.files.places[held.spec.name]
        if file.name in self.plan.linked:
            return
        owner, rank = self.plan.owners[file.name], self.peers.rank
        segments = self.plan.segments[position]
        for start, stop in chunks(held.spec, self.plan.chunk_bytes):
            pieces = clip(segments, start, stop)
            if rank == owner:
                self.files.write(file, _receive_chunk(pieces, start, stop, held, self.peers))
            elif mine := [piece for piece in pieces if piece.rank == rank]:
                self.outbox.send(held.join(mine), owner)


def _receive_chunk(pieces: Sequence[Segment], start: int, stop: int, held: Held, peers: Peers) -> torch.Tensor:
    """Assemble elements [start, stop) on their owner: one message from each rank that has a piece."""
    if all(piece.rank == peers.rank for piece in pieces):
        return held.join(pieces)
    size = held.itemsize
    chunk = torch.empty((stop - start) * size, dtype=torch.uint8)
    places = {piece: chunk[(piece.start - start) * size : (piece.stop - start) * size] for piece in pieces}
    incoming: list[tuple[Transfer, torch.Tensor, list[torch.Tensor]]] = []
    for rank in dict.fromkeys(piece.rank for piece in pieces if piece.rank != peers.rank):
        targets = [place for piece, place in places.items() if piece.rank == rank]
        message = targets[0] if len(targets) == 1 else torch.empty(sum(map(len, targets)), dtype=torch.uint8)
        incoming.append((peers.receive(message, rank), message, targets))
    for piece, place in places.items():
        if piece.rank == peers.rank:
            place.copy_(held.view(piece.start, piece.stop))
    for transfer, message, targets in incoming:
        transfer.wait()
        if len(targets) > 1:
            ends = accumulate(map(len, targets))
            for target, end in zip(targets, ends, strict=True):
                target.copy_(message[end - len(target) : end])
    return chunk


class _Outbox:
    """Sends that are under way, bounded in bytes; the oldest is waited for first."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._pending: deque[tuple[Transfer, int]] = deque()
        self._bytes = 0

    def send(self, data: torch.Tensor, to: int) -> None:
        self._pending.append((self._peers.send(data, to), len(data)))
        self._bytes += len(data)
        while self._bytes > PENDING_SEND_BYTES:
            self._wait_for_oldest()

    def flush(self) -> None:
        while self._pending:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        transfer, size = self._pending.popleft()
        transfer.wait()
        self._bytes -= size


# --- files ----------------------------------------------------------------------------------------------------------


class _OpenFile:
    """A file that is being streamed out, and the spans written so far."""

    def __init__(self, directory: str, file: StoredFile) -> None:
        self.file = file
        self.spans: list[Span] = []
        self.position = 0
        self._stack = ExitStack()
        self._stream: IO[bytes] = self._stack.enter_context(storage.open_write(storage.join(directory, file.name)))
        self.write(memoryview(file.header))

    def write(self, data: memoryview) -> None:
        self._stream.write(data)
        self.spans.append(Span(self.position, len(data), zlib.crc32(data)))
        self.position += len(data)

    def close(self) -> None:
        self._stack.close()

    def abort(self, error: Exception) -> None:
        with suppress(Exception):  # the reason is known already; that tidying up failed too adds nothing
            self._stack.__exit__(type(error), error, error.__traceback__)


class _FileWriter:
    """The files this rank owns, written by one thread, so that storage and transport overlap."""

    def __init__(self, directory: str, owned: Sequence[StoredFile], failures: list[Exception]) -> None:
        self._directory = directory
        self._owned = owned
        self._failures = failures
        self._open: dict[str, _OpenFile] = {}
        self._records: list[FileRecord] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> _FileWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._failures.append(error if isinstance(error, Exception) else InfrastructureError("interrupted"))
        for file in self._owned:
            self._submit(file, memoryview(b""))  # a file whose tensors are all empty has had no chunk
        self._thread.shutdown(wait=True)
        for opened in self._open.values():
            opened.abort(self._failures[0])

    def write(self, file: StoredFile, chunk: torch.Tensor) -> None:
        """Append a chunk to its file; waits when storage is behind."""
        self._submit(file, chunk.numpy().data)

    def records(self) -> list[FileRecord]:
        """The files that are complete."""
        return self._records

    def _submit(self, file: StoredFile, data: memoryview) -> None:
        self._pending.append(self._thread.submit(self._append, file, data))
        while len(self._pending) > PENDING_WRITES:
            self._pending.popleft().result()

    def _append(self, file: StoredFile, data: memoryview) -> None:
        if self._failures or any(record.path == file.name for record in self._records):
            return
        try:
            if file.name not in self._open:
                self._open[file.name] = _OpenFile(self._directory, file)
            opened = self._open[file.name]
            if data:
                opened.write(data)
            if opened.position == file.size:
                del self._open[file.name]
                opened.close()
                self._records.append(FileRecord(file.name, file.size, tuple(opened.spans)))
        except Exception as error:
            self._failures.append(error)
