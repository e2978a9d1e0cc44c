"""Arrow IPC, as Feather and `datasets` write it: a block is a record batch, read by one range.

Both layouts (file and stream) are a sequence of messages: the schema, dictionaries, record batches. The file layout
has a footer that says where they are; in a stream one goes from message to message. A batch is decoded as a stream of
its own: what stands in front of the first batch, then the batch. Format: https://arrow.apache.org/docs/format/Columnar.html
(flatbuffers Message.fbs, File.fbs).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import storage
from ..storage import FileInfo
from .block import UNKNOWN_ROWS, Block, BlockAddress, Scan
from .columnar import ArrowBlock, readable, wanted_columns
from .kinds import kinds_of_schema
from .memory import require_memory
from .whole import one_block

MAGIC = b"ARROW1"
STREAM_IN_FILE = 8
"""Where the first message of the file layout stands."""

CONTINUATION = 0xFFFFFFFF
HEAD_BYTES = 2**16
"""Read at the beginning of a message; metadata is usually shorter."""

SCHEMA, DICTIONARY, BATCH = 1, 2, 3
END = 0

REMEDY = "Write the file with smaller record batches (max_chunksize in pyarrow, writer_batch_size in datasets)."

FOOTER_BLOCK = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("padding", "<i4"), ("body", "<i8")])


class Message(NamedTuple):
    """A message in a file: bytes [start, stop). `rows` of a record batch."""

    kind: int
    start: int
    stop: int
    rows: int


class Table(NamedTuple):
    """A flatbuffers table at a place in its buffer."""

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> Table:
        """The buffer's root table."""
        return cls(data, _number("<I", data, 0))

    def place(self, field: int) -> int | None:
        """Where a field's value is; None: not there."""
        vtable = self.at - _number("<i", self.data, self.at)
        entry = 4 + 2 * field
        if entry >= _number("<H", self.data, vtable):
            return None
        offset = _number("<H", self.data, vtable + entry)
        return self.at + offset if offset else None

    def number(self, field: int, code: str) -> int:
        """A number; 0 when it is not there, which is flatbuffers' default."""
        place = self.place(field)
        return 0 if place is None else _number(code, self.data, place)

    def table(self, field: int) -> Table:
        """A table that the field points to."""
        place = self.place(field)
        if place is None:
            raise ValueError("a message without a header")
        return Table(self.data, place + _number("<I", self.data, place))

    def blocks(self, field: int) -> Any:
        """A vector of `FOOTER_BLOCK`."""
        place = self.place(field)
        if place is None:
            return np.empty(0, FOOTER_BLOCK)
        vector = place + _number("<I", self.data, place)
        return np.frombuffer(self.data, FOOTER_BLOCK, count=_number("<I", self.data, vector), offset=vector + 4)


def _number(code: str, data: bytes, at: int) -> int:
    number: int = struct.unpack_from(code, data, at)[0]
    return number


def _is_file(file: FileInfo) -> bool:
    return storage.read_file(file, 0, min(STREAM_IN_FILE, file.size)).startswith(MAGIC)


def _messages(file: FileInfo) -> Iterator[Message]:
    """The messages of a file, one after the other; a small read each."""
    at = STREAM_IN_FILE if _is_file(file) else 0
    while at < file.size:
        head = storage.read_file(file, at, min(at + HEAD_BYTES, file.size))
        prefix = 8 if _number("<I", head, 0) == CONTINUATION else 4  # without it before Arrow 0.15
        length = _number("<i", head, prefix - 4)
        if length == END:
            return
        if not 0 < prefix + length <= file.size - at:
            raise ValueError(f"no message at byte {at}")
        if prefix + length > len(head):
            head = storage.read_file(file, at, at + prefix + length)
        message = Table.root(head[prefix : prefix + length])
        kind = message.number(1, "<B")
        rows = message.table(2).number(0, "<q") if kind == BATCH else 0
        stop = at + prefix + length + message.number(3, "<q")
        if not at < stop <= file.size:
            raise ValueError(f"a message ends at byte {stop} of {file.size}")
        yield Message(kind, at, stop, rows)
        at = stop


@lru_cache(maxsize=512)
def _preamble(file: FileInfo) -> bytes:
    """Schema and dictionaries: everything in front of the first record batch."""
    start = stop = STREAM_IN_FILE if _is_file(file) else 0
    for message in _messages(file):
        if message.kind == BATCH:
            break
        stop = message.stop
    return storage.read_file(file, start, stop)


def _batches(file: FileInfo) -> list[Message] | None:
    """The record batches; None when a dictionary changes between them, so that none can be read alone."""
    messages = _from_footer(file) if _is_file(file) else list(_messages(file))
    batches = [message for message in messages if message.kind == BATCH]
    changes = batches and any(m.kind == DICTIONARY and m.start > batches[0].start for m in messages)
    return None if changes else batches


def _from_footer(file: FileInfo) -> list[Message]:
    tail = storage.read_file(file, max(0, file.size - HEAD_BYTES), file.size)
    if not tail.endswith(MAGIC):
        raise ValueError("its end is missing")
    length = _number("<i", tail, len(tail) - len(MAGIC) - 4)
    end = file.size - len(MAGIC) - 4
    if not 0 < length < end:
        raise ValueError(f"a footer of {length} bytes")
    footer = Table.root(storage.read_file(file, end - length, end))
    found = [
        Message(kind, int(one["offset"]), int(one["offset"] + one["metadata"] + one["body"]), UNKNOWN_ROWS)
        for kind, field in ((DICTIONARY, 2), (BATCH, 3))
        for one in footer.blocks(field)
    ]
    if not all(STREAM_IN_FILE <= message.start < message.stop <= end for message in found):
        raise ValueError("its footer names batches that it does not hold")
    return sorted(found, key=lambda message: message.start)


def scan(file: FileInfo) -> Scan:
    """Record batches, from the footer or from message to message."""
    import pyarrow as pa

    batches = readable(file, "arrow", lambda: _batches(file))
    columns = readable(file, "arrow", lambda: kinds_of_schema(pa.ipc.read_schema(pa.py_buffer(_preamble(file)))))
    if batches is None:
        return one_block(file, columns)
    return Scan(
        np.array([message.start for message in batches], np.int64),
        np.array([message.stop - message.start for message in batches], np.int64),
        np.array([message.rows for message in batches], np.int64),
        columns,
    )


def read(address: BlockAddress) -> Block:
    """The rows of a record batch, or of the whole file where the index has it as one block."""
    require_memory(address.file, 2 * address.nbytes, f"record batch {address.number}", REMEDY)
    table = readable(address.file, "arrow", lambda: _table(address))
    return ArrowBlock(table.select(list(wanted_columns(address, table.column_names))))


def _table(address: BlockAddress) -> Any:
    """The batch as a table. It is validated, because Arrow trusts the offsets in a file: a damaged one would crash."""
    table = _stored(address)
    table.validate(full=True)
    return table


def _stored(address: BlockAddress) -> Any:
    import pyarrow as pa

    file = address.file
    data = storage.read_file(file, address.start, address.start + address.nbytes)
    if address.start:
        return pa.ipc.open_stream(pa.py_buffer(_preamble(file) + data)).read_all()
    open_layout = pa.ipc.open_file if data.startswith(MAGIC) else pa.ipc.open_stream
    return open_layout(pa.py_buffer(data)).read_all()
