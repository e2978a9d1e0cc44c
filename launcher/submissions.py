"""What a run directory knows of the times the run was submitted to a cluster.

submissions/NNN-JOB.json       where it was submitted (`cluster.base.Record`), written by the driver
submissions/NNN-JOB.log        what the driver printed, some seconds late
submissions/NNN-JOB.end.json   its exit code
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster.base import Record
from ..distributed import storage
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import FtlaunchError, UserError

FOLDER = "submissions"
END = ".end.json"
COPY_LOCAL_S = 1.0
COPY_REMOTE_S = 15.0
"""Between copies of the log; an object store takes each one whole."""


@dataclass(frozen=True)
class Submission:
    """One of them, as the run directory has it. `exit_code`: None while it runs, or if its driver was killed."""

    name: str
    record: Record
    exit_code: int | None


def register(run: RunDirectory, record: Record) -> str:
    """Keep a record; returns the submission's name."""
    name = f"{len(_records(run)) + 1:03d}-{record['job']}"
    storage.write_bytes(run.path(FOLDER, f"{name}.json"), json.dumps(record, indent=2).encode() + b"\n")
    return name


def finish(run: RunDirectory, name: str, exit_code: int) -> None:
    """The driver has ended."""
    end = {"exit_code": exit_code, "ended_at": time.time()}
    storage.write_bytes(run.path(FOLDER, f"{name}{END}"), json.dumps(end).encode() + b"\n")


def newest(run: RunDirectory) -> Submission:
    """Raises UserError for a run that was never submitted."""
    found = latest(run)
    if found is None:
        raise UserError(f"{run.url} was not submitted to a cluster: it ran, or runs, where it was started")
    return found


def latest(run: RunDirectory) -> Submission | None:
    """The newest submission; None for a run that was never submitted."""
    records = _records(run)
    if not records:
        return None
    name = records[-1]
    ended = storage.exists(run.path(FOLDER, f"{name}{END}"))
    return Submission(
        name=name,
        record=_read(run, f"{name}.json"),
        exit_code=_read(run, f"{name}{END}")["exit_code"] if ended else None,
    )


def _records(run: RunDirectory) -> list[str]:
    """The submissions' names, the oldest first."""
    names = [name for name in storage.list_names(run.path(FOLDER)) if not name.endswith(END)]
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def read_log(run: RunDirectory, name: str) -> bytes:
    """What the driver has printed; empty before the first copy."""
    url = run.path(FOLDER, f"{name}.log")
    return storage.read_bytes(url) if storage.exists(url) else b""


def _read(run: RunDirectory, name: str) -> dict[str, Any]:
    return dict(json.loads(storage.read_bytes(run.path(FOLDER, name))))


class LogCopy:
    """Keeps a copy of this process's output in the run directory, until `close`."""

    def __init__(self, run: RunDirectory, name: str, source: Path) -> None:
        self._url, self._source, self._copied = run.path(FOLDER, f"{name}.log"), source, 0
        self._every_s = COPY_LOCAL_S if storage.is_local(run.url) else COPY_REMOTE_S
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
        """With everything printed so far."""
        self._closed.set()
        self._thread.join()
        self._copy()
