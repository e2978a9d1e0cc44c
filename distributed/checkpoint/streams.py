"""Write the parts of a checkpoint as final safetensors files, each of which one rank streams out in file order: into
folders that are shared by several hosts, and into object stores that take a file from one process only."""

from __future__ import annotations

import queue
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import IO

import torch

from ...recipes.errors import InfrastructureError
from .. import storage
from .exchange import CHUNK_BYTES
from .layout import StoredFile
from .manifest import FileRecord
from .movement import PIECES_AHEAD, Movement
from .parts import Part
from .peers import Peers
from .spans import Piece, records_of

THREADS = 2
"""Each writes some of the files: one waits for storage while the other computes a checksum."""

PENDING_WRITES = 4
"""Chunks that wait for storage while the next ones are received."""

UPLOAD_BYTES = 4 * 2**20
"""What a store's client collects of each open file before it sends that; there are up to eight."""


def save_streamed(parts: Sequence[Part], peers: Peers) -> dict[str, list[FileRecord]]:
    """Write the parts' files; collective. Returns the records of the files that this rank wrote, by stem.

    If any rank fails, all ranks raise: the failing one its own error, the others UserError or InfrastructureError.
    """
    failures: list[Exception] = []
    with peers.together(f"writing {', '.join(part.plan.files.stem for part in parts)}"):
        with Streams(parts, failures) as sink:
            # Clients of object stores keep a buffer for each open file: with all parts at once they were too many.
            local = all(storage.is_local(part.directory) for part in parts)
            Movement(peers, sink, failures).run(parts, side_by_side=local)
        if failures:
            raise failures[0]
    return {
        part.plan.files.stem: list(records_of(part.plan.owned(), sink.pieces, part.plan.chunk_bytes)) for part in parts
    }


class _OpenFile:
    """A file that is being streamed out; the pieces written so far are noted."""

    def __init__(self, directory: str, file: StoredFile, pieces: list[Piece]) -> None:
        self.position = 0
        self._file = file
        self._pieces = pieces
        self._stack = ExitStack()
        url = storage.join(directory, file.name)
        self._stream: IO[bytes] = self._stack.enter_context(storage.open_write(url, block_bytes=UPLOAD_BYTES))
        self.write(0, memoryview(file.header))

    def write(self, offset: int, data: memoryview) -> None:
        assert offset == self.position, f"{self._file.name}: bytes from {offset} on follow {self.position}"
        self._stream.write(data)
        self._pieces.append(Piece(self._file.name, offset, len(data), zlib.crc32(data)))
        self.position += len(data)

    def close(self) -> None:
        self._stack.close()

    def abort(self, error: Exception) -> None:
        with suppress(Exception):  # the reason is known already; that tidying up failed too adds nothing
            self._stack.__exit__(type(error), error, error.__traceback__)


class Streams:
    """The files that this rank writes, in threads, so that storage and transport overlap."""

    def __init__(self, parts: Sequence[Part], failures: list[Exception]) -> None:
        self.pieces: list[Piece] = []
        self._failures = failures
        self._owned = {file.name: (part.directory, file) for part in parts for file in part.plan.owned()}
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer") for _ in range(THREADS)]
        self._thread_of = {name: self._threads[number % THREADS] for number, name in enumerate(self._owned)}
        self._open: dict[str, _OpenFile] = {}
        self._done: set[str] = set()
        self._rooms: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        chunk_bytes = max((part.plan.chunk_bytes for part in parts), default=CHUNK_BYTES)
        for _ in range(PIECES_AHEAD + PENDING_WRITES if self._owned else 0):
            self._rooms.put(torch.empty(chunk_bytes, dtype=torch.uint8))

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._failures.append(error if isinstance(error, Exception) else InfrastructureError("interrupted"))
        for name in self._owned:  # a file whose tensors are all empty has had no chunk
            self._thread_of[name].submit(self._append, name, 0, None)
        for thread in self._threads:
            thread.shutdown(wait=True)
        for opened in self._open.values():
            opened.abort(self._failures[0])

    def room(self, file: StoredFile, offset: int, length: int) -> torch.Tensor:
        """See `movement.Sink`. Memory is used again: a fresh page costs more than a copy into it."""
        return self._rooms.get()[:length]

    def put(self, file: StoredFile, offset: int, data: torch.Tensor) -> None:
        """See `movement.Sink`."""
        done: Future[None] = self._thread_of[file.name].submit(self._append, file.name, offset, data)
        room = data._base if data._base is not None else data
        done.add_done_callback(lambda _: self._rooms.put(room))

    def _append(self, name: str, offset: int, data: torch.Tensor | None) -> None:
        if self._failures or name in self._done:
            return
        directory, file = self._owned[name]
        try:
            opened = self._open.get(name)
            if opened is None:
                opened = self._open[name] = _OpenFile(directory, file, self.pieces)
            if data is not None:
                opened.write(offset, data.numpy().data)
            if opened.position == file.size:
                del self._open[name]
                self._done.add(name)
                opened.close()
        except Exception as error:
            self._failures.append(error)
