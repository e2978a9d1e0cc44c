"""A file on this machine, kept in a run directory as it grows."""

from __future__ import annotations

import threading
from pathlib import Path

from ..distributed import storage
from ..recipes.errors import FtlaunchError

COPY_LOCAL_S = 1.0
COPY_REMOTE_S = 15.0
"""Between copies; an object store takes each one whole."""


class LogCopy:
    """Keeps a copy of `source` at `url`, until `close`."""

    def __init__(self, url: str, source: Path) -> None:
        self._url, self._source, self._copied = url, source, 0
        self._every_s = COPY_LOCAL_S if storage.is_local(url) else COPY_REMOTE_S
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._closed.wait(self._every_s):
            self._copy()

    def _copy(self) -> None:
        text = self._source.read_bytes()
        if len(text) == self._copied:
            return
        try:
            storage.write_bytes(self._url, text)
            self._copied = len(text)
        except FtlaunchError:
            return  # the run itself tells of a storage that fails; the next copy is whole again

    def close(self) -> None:
        """With everything written so far."""
        self._closed.set()
        self._thread.join()
        self._copy()
