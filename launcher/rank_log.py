"""What a rank prints, kept in the run directory: logs/aN.rank-00003.log.

Everything that its process writes to standard output and error goes there, what libraries in other languages write
too. On a disk it is written there at once, so that a rank that is killed leaves its last words; on an object store a
copy is, every some seconds.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from ..distributed import storage
from ..distributed.run_directory import RunDirectory
from .log_copy import LogCopy

FOLDER = "logs"
STREAMS = (1, 2)


def rank_log_url(run: RunDirectory, attempt: int, rank: int) -> str:
    """Where it is kept."""
    return run.path(FOLDER, f"a{attempt}.rank-{rank:05d}.log")


class RankLog:
    """Takes this process's output from now on, until `close`. Before the run is known it goes to a file of its own."""

    def __init__(self) -> None:
        number, name = tempfile.mkstemp(prefix="ftlaunch-rank-", suffix=".log")
        self._early = Path(name)
        self._before = [os.dup(stream) for stream in STREAMS]
        self._copy: LogCopy | None = None
        _send(number)

    def keep(self, run: RunDirectory, attempt: int, rank: int) -> None:
        """The run and its attempt are known; so is what was printed until now."""
        # Not print: Ray Train's own sends it to a logger of Ray's as well.
        sys.stdout.write(f"rank {rank} of attempt {attempt}, on {socket.gethostname()}, process {os.getpid()}\n")
        url = rank_log_url(run, attempt, rank)
        if not storage.is_local(url):
            self._copy = LogCopy(url, self._early)
            return
        path = storage.local_path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        _flush()
        with self._early.open("rb") as early, path.open("ab") as kept:
            shutil.copyfileobj(early, kept)
        _send(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))
        self._early.unlink()  # a rank that is killed leaves no second log

    def close(self) -> None:
        """With everything printed so far."""
        _flush()
        if self._copy is not None:
            self._copy.close()
        for stream, before in zip(STREAMS, self._before, strict=True):
            os.dup2(before, stream)
            os.close(before)
        self._early.unlink(missing_ok=True)


def _send(number: int) -> None:
    """Standard output and error go to an open file, which is taken over."""
    _flush()
    for stream in STREAMS:
        os.dup2(number, stream)
    os.close(number)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
