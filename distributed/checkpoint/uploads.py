"""Write the parts of a checkpoint into an object store whose uploads take parts from any process: every rank sends the
blocks of files that it holds most of, several at once. A file appears whole when its maker finishes the upload."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from ...recipes.errors import InfrastructureError
from .. import storage
from .crc import combine_crc32
from .layout import StoredFile
from .manifest import FileRecord
from .movement import Movement
from .parts import Part
from .peers import Peers
from .spans import Piece, records_of

THREADS = 4
"""Parts that a rank sends at once."""

BLOCKS = 10
"""Blocks in memory: one of each of the eight files that are filled side by side, at worst, and two on their way."""

REQUESTS_AT_ONCE = 16
"""A store answers in some 20 ms when an upload is begun or finished, and a large model has hundreds of files."""


class _Upload(NamedTuple):
    """A file that is being uploaded."""

    url: str
    name: str


def save_uploaded(parts: Sequence[Part], peers: Peers, uploads: storage.PartUploads) -> dict[str, list[FileRecord]]:
    """Write the parts' files; collective. Returns the records of the files that this rank made, by stem.

    If any rank fails, all ranks raise: the failing one its own error, the others UserError or InfrastructureError.
    """
    owned = {file.name: (part, file) for part in parts for file in part.plan.owned()}
    begun: dict[str, _Upload] = {}
    try:
        with peers.together("beginning to upload"):
            _at_once(partial(_begin, uploads, begun), ((name, part) for name, (part, _) in owned.items()))
        everyone = peers.gather(begun)
        pieces, marks = _send(parts, peers, uploads, {name: one for ranks in everyone for name, one in ranks.items()})
        with peers.together("finishing uploads"):
            finished = ((begun[name], marks[name], file.size) for name, (_, file) in owned.items())
            _at_once(partial(_finish, uploads), finished)
    except BaseException:
        _at_once(lambda one: uploads.abort(one.url, one.name), ((one,) for one in begun.values()))
        raise
    return {part.plan.files.stem: list(records_of(part.plan.owned(), pieces, part.plan.chunk_bytes)) for part in parts}


def _begin(uploads: storage.PartUploads, begun: dict[str, _Upload], name: str, part: Part) -> None:
    url = storage.join(part.directory, name)
    begun[name] = _Upload(url, uploads.begin(url))


def _finish(uploads: storage.PartUploads, upload: _Upload, marks: Mapping[int, storage.PartMark], size: int) -> None:
    uploads.finish(upload.url, upload.name, [marks[number] for number in sorted(marks)], size)


def _at_once(act: Callable[..., None], each: Iterable[tuple[object, ...]]) -> None:
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for done in [pool.submit(act, *arguments) for arguments in each]:
            done.result()


def _send(
    parts: Sequence[Part], peers: Peers, uploads: storage.PartUploads, begun: Mapping[str, _Upload]
) -> tuple[list[Piece], dict[str, dict[int, storage.PartMark]]]:
    """Send all blocks; what all ranks have sent: pieces of files, and the store's marks by file and number."""
    failures: list[Exception] = []
    with peers.together(f"writing {', '.join(part.plan.files.stem for part in parts)}"):
        with Blocks(parts, uploads, begun, failures) as sink:
            Movement(peers, sink, failures).run(parts, side_by_side=False)
            sink.add_headers()
        if failures:
            raise failures[0]
    pieces: list[Piece] = []
    marks: dict[str, dict[int, storage.PartMark]] = {name: {} for name in begun}
    for sent_pieces, sent_marks in peers.gather((sink.pieces, sink.marks)):
        pieces += sent_pieces
        for (name, number), mark in sent_marks.items():
            marks[name][number] = mark
    return pieces, marks


@dataclass
class _Block:
    """Bytes of a file from `start` on, and where they came in pieces: (first byte in the block, their number)."""

    file: StoredFile
    number: int
    start: int
    size: int
    memory: bytearray
    pieces: list[tuple[int, int]] = field(default_factory=list)
    filled: int = 0

    def room(self, offset: int, length: int) -> torch.Tensor:
        return torch.frombuffer(self.memory, dtype=torch.uint8, offset=offset - self.start, count=length)

    def note(self, offset: int, length: int) -> None:
        self.pieces.append((offset - self.start, length))
        self.filled += length


class Blocks:
    """The blocks that this rank sends. A block's memory is used again: a fresh page costs more than a copy into it."""

    def __init__(
        self,
        parts: Sequence[Part],
        uploads: storage.PartUploads,
        begun: Mapping[str, _Upload],
        failures: list[Exception],
    ) -> None:
        self.pieces: list[Piece] = []
        self.marks: dict[tuple[str, int], storage.PartMark] = {}
        self._parts = parts
        self._cuts = {name: cut for part in parts for name, cut in part.plan.cuts.items()}
        self._uploads = uploads
        self._begun = begun
        self._failures = failures
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-writer")
        self._open: dict[tuple[str, int], _Block] = {}
        self._sending: deque[Future[bytearray]] = deque()
        self._free: list[bytearray] = []

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._failures.append(error if isinstance(error, Exception) else InfrastructureError("interrupted"))
        self._threads.shutdown(wait=True)

    def room(self, file: StoredFile, offset: int, length: int) -> torch.Tensor:
        """See `movement.Sink`."""
        number = offset // self._cuts[file.name].step
        block = self._open.get((file.name, number)) or self._begin(file, number)
        return block.room(offset, length)

    def put(self, file: StoredFile, offset: int, data: torch.Tensor) -> None:
        """See `movement.Sink`."""
        block = self._open[file.name, offset // self._cuts[file.name].step]
        block.note(offset, len(data))
        self._send_if_full(block)

    def add_headers(self) -> None:
        """Blocks that hold nothing but a header: those before a file's first tensor, and files without any."""
        for plan in (part.plan for part in self._parts):
            for file in (file for file in plan.files.files if file.name not in plan.linked):
                cut = plan.cuts[file.name]
                for number in range(-(-len(file.header) // cut.step)):
                    is_header = min(file.size, (number + 1) * cut.step) <= len(file.header)
                    if is_header and cut.writers[number] == plan.rank:
                        self._send_if_full(self._begin(file, number))

    def _begin(self, file: StoredFile, number: int) -> _Block:
        while self._sending and len(self._open) + len(self._sending) >= BLOCKS:
            self._free.append(self._sending.popleft().result())
        step = self._cuts[file.name].step
        start = number * step
        size = min(step, file.size - start)
        memory = self._free.pop() if self._free else bytearray(storage.part_bytes(0))
        if len(memory) < size:
            memory = bytearray(size)
        block = self._open[file.name, number] = _Block(file, number, start, size, memory)
        if header := file.header[start : start + size]:
            memory[: len(header)] = header
            block.note(start, len(header))
        return block

    def _send_if_full(self, block: _Block) -> None:
        if block.filled == block.size:
            del self._open[block.file.name, block.number]
            self._sending.append(self._threads.submit(self._send, block))

    def _send(self, block: _Block) -> bytearray:
        if not self._failures:
            try:
                whole = self._checksum(block)
                upload = self._begun[block.file.name]
                data = block.memory if len(block.memory) == block.size else bytes(block.memory[: block.size])
                mark = self._uploads.send(upload.url, upload.name, block.number + 1, data, whole)
                self.marks[block.file.name, block.number + 1] = mark
            except Exception as error:
                self._failures.append(error)
        return block.memory

    def _checksum(self, block: _Block) -> int:
        """CRC-32 of a block, from those of its pieces, which are noted."""
        whole, view = 0, memoryview(block.memory)
        for first, length in sorted(block.pieces):
            crc32 = zlib.crc32(view[first : first + length])
            self.pieces.append(Piece(block.file.name, block.start + first, length, crc32))
            whole = combine_crc32(whole, crc32, length)
        return whole
