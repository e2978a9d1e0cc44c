"""Decoded blocks on a node's local disk: large ones of which each stream serves a part, or all of them where the recipe
asks for it. They are fetched and decoded once, and mapped by all processes of the node.

A decoded block is an Arrow IPC file in a private folder on local disk. Whoever wants a block first decodes it under a
lock and the others wait; all map the file, so that its pages are in memory once and the system may drop them. The
folder is `node_folder`'s.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..node_folder import locked, make_room
from .block import Block
from .formats import FORMATS
from .index import Index

LARGE_BYTES = 8 * 2**20
"""Stored bytes of a block from which on it is shared; to decode a smaller one again costs less than to store it."""

MAPPED_BYTES = 2**16
"""What a mapped block counts for in the memory of the process that maps it."""


@dataclass(frozen=True)
class NodePlace:
    """Where the decoded blocks of one index lie on a node, and how many bytes they may take. `every_block`: small ones
    too, and those that only one stream serves, so that no later epoch fetches them again."""

    folder: Path
    max_bytes: int
    every_block: bool = False


class BlockReader:
    """Reads the blocks of an index, and counts what was read. `place` None: nothing is shared."""

    def __init__(self, index: Index, place: NodePlace | None) -> None:
        self._index = index
        self._place = place
        self._lock = threading.Lock()
        self.read_bytes = 0
        """Stored bytes of the blocks that were read, each as often as it was."""

    def read(self, block: int) -> Block:
        """A block. Raises UserError that names a damaged file."""
        return self._read(block, self._place is not None and self._place.every_block)

    def read_part(self, block: int) -> Block:
        """A block that others on the node may want too."""
        large = int(self._index.block_bytes[block]) >= LARGE_BYTES
        return self._read(block, self._place is not None and (large or self._place.every_block))

    def joins(self, block: int) -> bool:
        """See `cache.Neighbours`; of blocks on the node's disk each is one by itself."""
        file = self._index.block_file
        private = self._place is None or not self._place.every_block
        return bool(private and file[block] == file[block + 1] and FORMATS[self._index.kind(block)].read_run)

    def read_run(self, blocks: Sequence[int]) -> list[Block]:
        """See `cache.Neighbours`."""
        decoded = self._index.read_run(blocks)
        with self._lock:
            self.read_bytes += int(self._index.block_bytes[blocks].sum())
        return [self._index.used_rows(block, whole) for block, whole in zip(blocks, decoded, strict=True)]

    def _read(self, block: int, shared: bool) -> Block:
        """Formats that cannot be mapped are never shared."""
        frozen = FORMATS[self._index.kind(block)].frozen
        if not shared or frozen is None or self._place is None:
            return self._index.used_rows(block, self._decode(block))
        path = self._place.folder / f"{block}.arrow"
        table = _mapped(path)
        if table is None:
            with locked(path.with_suffix(".lock")):
                table = _mapped(path)  # another process may have been first
                if table is None:
                    decoded = self._decode(block)
                    table = _stored(frozen.freeze(decoded), path, self._place)
                    if table is None:
                        return self._index.used_rows(block, decoded)
        whole = frozen.thaw(table, self._index.address(block))
        whole.memory_bytes = MAPPED_BYTES
        return self._index.used_rows(block, whole)

    def _decode(self, block: int) -> Block:
        decoded = self._index.read_whole(block)
        with self._lock:
            self.read_bytes += int(self._index.block_bytes[block])
        return decoded


def _stored(table: Any, path: Path, place: NodePlace) -> Any | None:
    """Write a table beside the others and map it; None when there is no room for it."""
    import pyarrow as pa

    temporary = path.with_suffix(".tmp")
    try:
        if not make_room(place.folder, ".arrow", table.nbytes, place.max_bytes):
            return None
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        temporary.replace(path)
    except OSError:  # the disk is full, or fails: the block is used without it
        return None
    finally:
        temporary.unlink(missing_ok=True)
    return _mapped(path)


def _mapped(path: Path) -> Any | None:
    """The table in a file; None: there is none. Its use is noted."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        os.utime(path)
    except FileNotFoundError:
        return None
    return table
