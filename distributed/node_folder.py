"""A folder on a node's local disk that the ranks of one attempt share there, and what keeps it within bounds.

It lives as long as any rank of the run's attempt on this node holds it; one that a crash left is removed by the next
run that starts there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..recipes.errors import InfrastructureError

FREE_SHARE = 0.2
"""Of the disk's free space when the folder is made: what its files may take, the least recently used leave first."""


class NodeFolder:
    """A rank's hold on the folder that the ranks of an attempt share on a node. `key` tells attempts apart."""

    def __init__(self, key: str, base: Path | None = None, *, max_bytes: int | None = None) -> None:
        """`max_bytes`: what its files may take; None: `FREE_SHARE`. Raises InfrastructureError where somebody else's
        folder is in the way."""
        root = (base or Path(tempfile.gettempdir())) / f"ftlaunch-blocks-{os.getuid()}"
        _make_private(root)
        _sweep(root)
        name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        self._lock = _hold(root / f"{name}.lock")
        _make_private(root / name)
        self.path = root / name
        self.max_bytes = max_bytes or int(shutil.disk_usage(root).free * FREE_SHARE)

    def close(self) -> None:
        """Let go of it; the last one removes it."""
        _remove_unless_held(self._lock, self.path)
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


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file for the block; a killed process lets go of it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
