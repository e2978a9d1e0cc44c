"""What the ranks of a node fetch of a model for each other: each block once, from an object store to the node's local
disk, where the others map it.

Whoever wants a block first fetches it under a lock, and the others wait. Blocks leave in the order in which they were
last wanted: ranks walk a model alike, so a window of it is enough, and one that falls behind fetches again.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import storage
from .node_folder import NodeFolder, locked, make_room
from .world import World

BLOCK = ".block"

WINDOW_BYTES = 2 * 2**30
"""At most this much of the node's local disk."""


class NodeShare:
    """A folder of blocks that the ranks of an attempt share on a node, within `max_bytes`. `turn`: this rank's
    place among them, 0 to 1."""

    def __init__(self, folder: Path, max_bytes: int, turn: float = 0.0) -> None:
        self._folder, self._max_bytes, self.turn = folder, max_bytes, turn

    def read(self, what: str, fetch: Callable[[], bytearray]) -> memoryview:
        """See `checkpoint.fetch.Share`. Without room on the disk a block is fetched for this rank alone."""
        path = self._folder / f"{hashlib.blake2b(what.encode(), digest_size=16).hexdigest()}{BLOCK}"
        found = _mapped(path)
        if found is None:
            with locked(path.with_suffix(".lock")):
                found = _mapped(path)  # another rank may have been first
                if found is None:
                    return memoryview(self._keep(path, fetch()))
        return found

    def _keep(self, path: Path, data: bytearray) -> bytearray:
        temporary = path.with_suffix(".tmp")
        try:
            if make_room(self._folder, BLOCK, len(data), self._max_bytes):
                temporary.write_bytes(data)
                temporary.replace(path)
        except OSError:  # the disk is full, or fails
            temporary.unlink(missing_ok=True)
        return data


def _mapped(path: Path) -> memoryview | None:
    """A block that is there; its use is noted."""
    try:
        with path.open("rb") as file:
            found = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        return None
    with suppress(FileNotFoundError):  # it may just have left
        now = time.time_ns()  # the file system's own clock ticks some 4 ms apart
        os.utime(path, ns=(now, now))
    return found


@contextmanager
def shared_on_node(url: str, world: World, attempt: str) -> Iterator[NodeShare | None]:
    """What the ranks of this node share of the files below `url`; None on a local disk, whose pages the system shares,
    and for a rank that is alone on its node. `attempt` tells attempts apart."""
    if storage.is_local(url) or world.local_size == 1:
        yield None
        return
    folder = NodeFolder(f"weights {attempt} {world.node_rank}")
    try:
        yield NodeShare(folder.path, min(WINDOW_BYTES, folder.max_bytes), world.local_rank / world.local_size)
    finally:
        folder.close()
