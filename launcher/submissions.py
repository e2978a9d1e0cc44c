"""What a run directory knows of the times the run was submitted to a cluster.

submissions/NNN-JOB.json       where it was submitted (`cluster.base.Record`), written by the driver, and before it has
                               begun where the directory is seen from where it was submitted
submissions/NNN-JOB.log        what the driver printed, some seconds late
submissions/NNN-JOB.end.json   its exit code
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from ..cluster.base import Record
from ..distributed import storage
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import UserError

FOLDER = "submissions"
END = ".end.json"
LEFT_WITH, AGAIN_AT = "left_with", "again_at"
"""Keys of a record: how its driver has left its nodes, until another one begins, and when that was. What an earlier one
has come to counts no more then."""


@dataclass(frozen=True)
class Submission:
    """One of them, as the run directory has it. `exit_code`: None while it runs, or if its driver was killed."""

    name: str
    record: Record
    exit_code: int | None


def register(run: RunDirectory, record: Record) -> str:
    """Keep a record, as its driver has begun; returns the submission's name. A driver that was started again belongs to
    the same one."""
    known = _known(run, record)
    now_s = time.time()
    begun = {**record, "began_at": now_s}
    if known is not None and "began_at" in (before := _read(run, f"{known}.json")):
        begun |= {"began_at": before["began_at"], AGAIN_AT: now_s}
    return _keep(run, known or _new_name(run, record), begun)


def expect(run: RunDirectory, record: Record) -> None:
    """Keep a record of what was submitted, and whose driver may have to wait for its nodes."""
    if _known(run, record) is None:
        _keep(run, _new_name(run, record), record)


def _known(run: RunDirectory, record: Record) -> str | None:
    names = [name for name in _records(run) if name.partition("-")[2] == str(record["job"])]
    return names[-1] if names else None


def _new_name(run: RunDirectory, record: Record) -> str:
    return f"{len(_records(run)) + 1:03d}-{record['job']}"


def _keep(run: RunDirectory, name: str, record: Record) -> str:
    storage.write_bytes(run.path(FOLDER, f"{name}.json"), json.dumps(record, indent=2).encode() + b"\n")
    return name


def leave(run: RunDirectory, name: str, code: int) -> None:
    """The driver has left its nodes, with LEFT, LEFT_EARLY or ELSEWHERE (`cluster/restarts.py`), to begin again."""
    _keep(run, name, {**_read(run, f"{name}.json"), LEFT_WITH: code})


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
    return _submission(run, records[-1]) if records else None


def all_submissions(run: RunDirectory) -> list[Submission]:
    """All of them, the oldest first."""
    return [_submission(run, name) for name in _records(run)]


def _submission(run: RunDirectory, name: str) -> Submission:
    record, code = _read(run, f"{name}.json"), None
    if storage.exists(run.path(FOLDER, f"{name}{END}")):
        end = _read(run, f"{name}{END}")
        code = end["exit_code"] if end["ended_at"] >= record.get(AGAIN_AT, 0.0) else None
    return Submission(name, record, code)


def _records(run: RunDirectory) -> list[str]:
    """The submissions' names, the oldest first."""
    names = [name for name in storage.list_names(run.path(FOLDER)) if not name.endswith(END)]
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def log_url(run: RunDirectory, name: str) -> str:
    """Where the copy of what the driver prints is."""
    return run.path(FOLDER, f"{name}.log")


def read_log(run: RunDirectory, name: str) -> bytes:
    """What the driver has printed; empty before the first copy."""
    url = log_url(run, name)
    return storage.read_bytes(url) if storage.exists(url) else b""


def write_log(run: RunDirectory, name: str, text: bytes) -> None:
    """What was printed where no driver came to copy it."""
    storage.write_bytes(run.path(FOLDER, f"{name}.log"), text)


def _read(run: RunDirectory, name: str) -> dict[str, Any]:
    return dict(json.loads(storage.read_bytes(run.path(FOLDER, name))))
