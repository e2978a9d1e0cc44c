"""A slow disk for this process: the system's calls write a few kilobytes at a time and take as long as such a disk.

What the product does is unchanged; the calls it makes are late. A kill then meets half-written files, as it does where
a save writes many gigabytes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import IO, Any

from ftlaunch.distributed import storage, storage_write
from ftlaunch.distributed.storage_place import is_local

SLICE_BYTES = 4096
PAUSED = ("fsync", "link", "replace", "unlink", "rmdir")


class Line:
    """`bytes_per_s` that all threads of the process share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def pass_bytes(self, count: int) -> None:
        """Wait until `count` bytes have gone through."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + count / self._rate
            done = self._free_at
        time.sleep(max(0.0, done - time.monotonic()))


class _SlowFile:
    """A local file that is streamed out; what was written so far is with the system, not in this process."""

    def __init__(self, file: IO[bytes], line: Line) -> None:
        self._file, self._line = file, line

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), SLICE_BYTES):
            piece = data[start : start + SLICE_BYTES]
            self._line.pass_bytes(len(piece))
            self._file.write(piece)
            self._file.flush()


def slow_down(bytes_per_s: float, pause_s: float) -> None:
    """From now on; for a process that will not live on."""
    line, pwrite, write_synced, open_write = (
        Line(bytes_per_s),
        os.pwrite,
        storage_write._write_synced,
        storage.open_write,
    )

    def slow_pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        piece = data[:SLICE_BYTES]
        line.pass_bytes(len(piece))
        return pwrite(descriptor, piece, offset)

    def slow_write_synced(path: Any, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        time.sleep(pause_s)
        write_synced(path, data)

    @contextmanager
    def slow_open_write(url: str, **options: Any) -> Iterator[Any]:
        with open_write(url, **options) as file:
            yield _SlowFile(file, line) if is_local(url) else file

    os.pwrite, storage_write._write_synced, storage.open_write = slow_pwrite, slow_write_synced, slow_open_write
    for name in PAUSED:
        setattr(os, name, _paused(getattr(os, name), pause_s))


def _paused(call: Callable[..., Any], pause_s: float) -> Callable[..., Any]:
    @wraps(call)
    def paused(*args: Any, **more: Any) -> Any:
        time.sleep(pause_s)
        return call(*args, **more)

    return paused
