"""Decoded blocks on a node's local disk: large ones of which each stream serves a part, or all of them where the recipe
asks for it. They are fetched and decoded once, and mapped by all processes of the node.

A decoded block is an Arrow IPC file in a private folder on local disk. Whoever wants a block first decodes it under a
lock and the others wait; all map the file, so that its pages are in memory once and the system may drop them. The
folder lives as long as any rank of the run's attempt on this node holds it; one that a crash left is removed by the
next run that starts there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...recipes.errors import InfrastructureError
from .block import Block
from .formats import FORMATS
from .index import Index

LARGE_BYTES = 8 * 2**20
"""Stored bytes of a block from which on it is shared; to decode a smaller one again costs less than to store it."""

FREE_SHARE = 0.2
"""Of the disk's free space when the folder is made: what blocks may take, the least recently used leave first."""

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


def make_room(folder: Path, suffix: str, nbytes: int, max_bytes: int) -> bool:
    """Whether so many bytes more may be stored among a folder's files of this suffix: those that were used least
    recently leave for them."""
    if nbytes > max_bytes:
        return False
    with locked(folder / "room.lock"):
        stored = sorted(_uses(folder, suffix))
        total = sum(size for _, _, size in stored)
        for _, path, size in stored:
            if total + nbytes <= max_bytes:
                break
            path.unlink(missing_ok=True)  # who has mapped it keeps it
            total -= size
    return True


def _uses(folder: Path, suffix: str) -> Iterator[tuple[int, Path, int]]:
    """When each file was last used, and its size."""
    for path in folder.glob(f"*{suffix}"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            yield status.st_mtime_ns, path, status.st_size


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


class NodeFolder:
    """A rank's hold on the folder that the ranks of an attempt share on a node. `key` tells attempts apart."""

    def __init__(self, key: str, base: Path | None = None, *, every_block_bytes: int | None = None) -> None:
        """`every_block_bytes`: what all blocks may take; None: only large ones are shared. Raises InfrastructureError
        where somebody else's folder is in the way."""
        root = (base or Path(tempfile.gettempdir())) / f"ftlaunch-blocks-{os.getuid()}"
        _make_private(root)
        _sweep(root)
        name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        self._lock = _hold(root / f"{name}.lock")
        _make_private(root / name)
        usual = int(shutil.disk_usage(root).free * FREE_SHARE)
        self.place = NodePlace(root / name, every_block_bytes or usual, every_block_bytes is not None)

    def close(self) -> None:
        """Let go of it; the last one removes it."""
        _remove_unless_held(self._lock, self.place.folder)
        os.close(self._lock)


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InfrastructureError(f"{folder} belongs to somebody else, or others may read it. Remove it.")


def _hold(path: Path) -> int:
    """A shared lock on a file that is really there: its last holder may just have removed it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == path.stat().st_ino:
                return lock
        os.close(lock)


def _remove_unless_held(lock: int, folder: Path) -> None:
    """Remove a folder and its lock file, unless another process holds the lock. A hold of one's own is given up
    first, so of several that leave at once the last one removes it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".lock").unlink(missing_ok=True)


def _sweep(root: Path) -> None:
    """Remove the folders that nobody holds: their processes were killed."""
    for path in root.glob("*.lock"):
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDWR)
            _remove_unless_held(lock, path.with_suffix(""))
            os.close(lock)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file for the block; a killed process lets go of it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
