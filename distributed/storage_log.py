"""A log that a later attempt continues, on disks and on object stores."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..recipes.errors import InfrastructureError
from .storage_errors import FULL
from .storage_list import exists
from .storage_place import is_local, local_path
from .storage_read import read_bytes
from .storage_write import write_bytes

REWRITE_EVERY_S = 30.0
"""Object stores have no append; the whole object is written again, at most this often."""


def complete_lines(data: bytes) -> bytes:
    """Everything up to the last newline: a line that a crash tore is dropped."""
    return data[: data.rfind(b"\n") + 1]


class LineLog:
    """JSON lines that a later attempt continues. One writer at a time, which may have several threads.
    `is_ours`: asked where lines of a later one would be written over; False drops ours.

    Local files are appended to line by line; while the disk is full, lines wait in memory. On object stores lines are
    kept in memory and the object is rewritten on `append` when `REWRITE_EVERY_S` have passed, on `flush` and on
    `close`. `clock` is in seconds.
    """

    def __init__(
        self, url: str, clock: Callable[[], float] = time.monotonic, is_ours: Callable[[], bool] = lambda: True
    ) -> None:
        self.url = url
        self._is_ours = is_ours
        self._clock = clock
        self._written_at = clock()
        self._local = is_local(url)
        stored = read_bytes(url) if exists(url) else b""
        kept = complete_lines(stored)
        self._lines = bytearray() if self._local else bytearray(kept)
        self._dirty = False
        self._lock = threading.RLock()
        if self._local:
            path = local_path(url)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            if len(kept) < len(stored):
                self._file.truncate(len(kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line."""
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._lines += line
            if self._local:
                self._write()
                return
            self._dirty = True
            if self._clock() - self._written_at >= REWRITE_EVERY_S:
                self.flush()

    def flush(self) -> None:
        """Bring every line to the file."""
        with self._lock:
            if self._local:
                self._write()
                os.fsync(self._file.fileno())
            elif self._dirty:
                if self._is_ours():
                    write_bytes(self.url, bytes(self._lines))
                self._written_at = self._clock()
                self._dirty = False

    def _write(self) -> None:
        """As many of the waiting bytes as the disk takes. A line that a crash tears is dropped by who opens the log."""
        try:
            while self._lines:
                del self._lines[: self._file.write(self._lines)]
        except OSError as error:
            if error.errno not in FULL:
                raise

    def close(self) -> None:
        """Flush and let go of the file. Raises InfrastructureError for lines that found no room to the end."""
        self.flush()
        if self._local:
            self._file.close()
            if self._lines:
                raise InfrastructureError(f"{self.url}: no space left for the last {self._lines.count(10)} lines")
