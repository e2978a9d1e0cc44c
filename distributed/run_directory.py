"""The run directory: the whole database of a run, on any fsspec URL.

recipe.yaml  recipe.aN.yaml  environment.json  facts.json  events.jsonl  metrics.jsonl  result.json
attempts/aN.json  aN.heartbeat  aN.end.json
failures/  stacks/             see launcher/budget.py and launcher/watch.py
commits/  step-000200.a1/        see checkpoint/commit.py
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import psutil

from ..recipes.errors import Superseded, UserError
from ..recipes.redact import redact_values
from . import storage
from .checkpoint.commit import COMMITS, directory_name
from .storage import LineLog

HEARTBEAT_EVERY_S = 15.0
"""An object store is written to at most this often."""

HEARTBEAT_DEAD_S = 120.0
"""A heartbeat from another host that is older than this belongs to a dead attempt; eight missed beats."""

MARKERS = frozenset({"recipe.yaml", "facts.json", "attempts", "submissions", "failures", COMMITS})
"""One of these makes a folder a run of ours."""

CHECK_REPORT = "check.html"
"""What `ftlaunch check` leaves here, before there is a run too."""

Status = Literal["new", "unfinished", "finished", "alive"]
Outcome = Literal["finished", "failed", "interrupted"]
Now = Callable[[], datetime]


def utc_now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Process:
    """A process, told from a later one with the same pid by when it started (seconds since 1970)."""

    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> Process:
        """The running process."""
        process = psutil.Process()
        return cls(socket.gethostname(), process.pid, process.create_time())

    def is_here(self) -> bool:
        """True if it is of this host, where it can be looked up."""
        return self.host == socket.gethostname()

    def exists(self) -> bool:
        """True while it runs on this host. Start times are read to a hundredth of a second and follow the clock."""
        try:
            found = psutil.Process(self.pid)
            same: bool = abs(found.create_time() - self.started) < 2
            return same and bool(found.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True)
class AttemptInfo:
    """One start of a run. `started_at`: ISO 8601 in UTC. `folder`: where relative paths of its recipe begin, on rank
    0's host; empty if it is not known. `began`: when its process was given the work, in seconds since 1970, where that
    had stood by; None: when it was started."""

    number: int
    process: Process
    started_at: str
    world_size: int
    command: tuple[str, ...]
    folder: str = ""
    began: float | None = None

    @property
    def began_s(self) -> float:
        """When it began, in seconds since 1970."""
        return self.process.started if self.began is None else self.began


class EventLog:
    """events.jsonl: what happened, when, in which attempt, without secrets. One writer: rank 0."""

    def __init__(self, log: LineLog, attempt: int, now: Now = utc_now, secrets: Sequence[str] = ()) -> None:
        self._log = log
        self._secrets = secrets
        self._attempt = attempt
        self._now = now

    def record(self, kind: str, **fields: Any) -> None:
        """Add an event, and bring it to storage at once: events are rare, and the last one is often the reason."""
        time = self._now().isoformat(timespec="milliseconds")
        shown = redact_values(fields, self._secrets)
        self._log.append({"time": time, "attempt": self._attempt, "event": kind, **shown})
        self._log.flush()

    def close(self) -> None:
        """Flush and let go of the file."""
        self._log.close()


class RunDirectory:
    """The files of a run below `url`, but for its checkpoints. `now` is injected so that tests need no time."""

    def __init__(self, url: str, now: Now = utc_now) -> None:
        self.url = url.rstrip("/")
        self._now = now

    def path(self, *parts: str) -> str:
        """The URL of something in the directory."""
        return storage.join(self.url, *parts)

    def step_directory(self, step: int, attempt: int) -> str:
        """Where an attempt writes the checkpoint of a step."""
        return self.path(directory_name(step, attempt))

    def check(self) -> None:
        """Raises UserError if this place cannot be written, or holds something that is no run."""
        names = [name for name in storage.list_names(self.url) if name != CHECK_REPORT]
        if names and not MARKERS & set(names):
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(
                f"{self.url} exists and is no run: it holds {listed}. Set another name or checkpoint.path, or empty it."
            )
        storage.check_writable(self.url)

    def status(self) -> Status:
        """Where the run stands."""
        if self.live_attempt() is not None:
            return "alive"
        if self.read_result() is not None:
            return "finished"
        return "unfinished" if MARKERS & set(storage.list_names(self.url)) else "new"

    # --- attempts ---------------------------------------------------------------------------------------------------

    def claim_attempt(
        self,
        *,
        world_size: int,
        command: Sequence[str],
        process: Process | None = None,
        folder: str = "",
        began: float | None = None,
    ) -> int:
        """Register a start of the run under the next free number, which is returned. Of several that claim at once,
        each gets its own. `began`: see `AttemptInfo`."""
        process = process or Process.this()
        number = max(self._attempt_numbers(), default=0) + 1
        while True:
            started_at = self._now().isoformat(timespec="seconds")
            info = AttemptInfo(number, process, started_at, world_size, tuple(command), folder, began)
            url = self.path("attempts", f"a{number}.json")
            data = _to_json(asdict(info))
            # An answer that got lost may hide our own success, so what is stored decides.
            if storage.create_exclusive(url, data) or storage.read_bytes(url) == data:
                return number
            number += 1

    def check_shared(self, attempt: int) -> None:
        """Raises UserError on a rank that does not see what rank 0 has just written here."""
        if not storage.exists(self.path("attempts", f"a{attempt}.json")):
            raise UserError(
                f"checkpoint.path: {self.url} on {socket.gethostname()} is not the folder that rank 0 writes to. Nodes "
                "must share it: name a shared folder by its whole path, or an object store (s3://…)."
            )

    def is_newest(self, attempt: int) -> bool:
        """Whether none has been registered since; numbers have no gaps."""
        return not storage.exists(self.path("attempts", f"a{attempt + 1}.json"))

    def check_newest(self, attempt: int) -> None:
        """Raises Superseded where another attempt has been registered since this one: whoever started it took this one
        for dead (a machine that slept, say, or was cut off), and two must not both say what the run is."""
        if self.is_newest(attempt):
            return
        newest = self.attempts()[-1]
        raise Superseded(
            f"attempt {attempt} of {self.url} ends here: it was taken for dead, and attempt {newest.number} goes on "
            f"with the run since {newest.started_at} on {newest.process.host}. Nothing that the run has saved was "
            "changed."
        )

    def heartbeat(self, attempt: int, step: int) -> None:
        """Say that the attempt lives, and which step it took last; `pulse.Pulse` does so every `HEARTBEAT_EVERY_S`."""
        beat = {"at": self._now().isoformat(), "step": step}
        storage.write_bytes(self.path("attempts", f"a{attempt}.heartbeat"), _to_json(beat))

    def finish_attempt(self, attempt: int, outcome: Outcome, message: str = "") -> None:
        """Register how an attempt ended; the first word counts."""
        end = {"outcome": outcome, "message": message, "ended_at": self._now().isoformat(timespec="milliseconds")}
        storage.create_exclusive(self.path("attempts", f"a{attempt}.end.json"), _to_json(end))

    def attempt_end(self, attempt: int) -> dict[str, Any] | None:
        """How an attempt ended: `outcome`, `message`, `ended_at`; None for one that could not say, or lives."""
        return _read_json(self.path("attempts", f"a{attempt}.end.json"))

    def last_beat(self, attempt: int) -> dict[str, Any] | None:
        """An attempt's last sign of life: `at`, `step`; None before the first."""
        return _read_json(self.path("attempts", f"a{attempt}.heartbeat"))

    def attempts(self) -> list[AttemptInfo]:
        """All attempts, oldest first."""
        return [self._attempt(number) for number in self._attempt_numbers()]

    def live_attempts(self) -> list[AttemptInfo]:
        """Attempts without an end that still run, newest first."""
        names = set(storage.list_names(self.path("attempts")))
        open_ends = [number for number in self._attempt_numbers() if f"a{number}.end.json" not in names]
        return [attempt for attempt in map(self._attempt, reversed(open_ends)) if self._is_alive(attempt)]

    def live_attempt(self) -> AttemptInfo | None:
        """The newest attempt that still runs."""
        return next(iter(self.live_attempts()), None)

    def _attempt_numbers(self) -> list[int]:
        names = storage.list_names(self.path("attempts"))
        return sorted(int(match[1]) for match in (re.fullmatch(r"a(\d+)\.json", name) for name in names) if match)

    def _attempt(self, number: int) -> AttemptInfo:
        stored = json.loads(storage.read_bytes(self.path("attempts", f"a{number}.json")))
        return AttemptInfo(**{**stored, "process": Process(**stored["process"]), "command": tuple(stored["command"])})

    def _is_alive(self, attempt: AttemptInfo) -> bool:
        if attempt.process.is_here():
            return attempt.process.exists()
        beat = self.last_beat(attempt.number)
        last = datetime.fromisoformat(attempt.started_at if beat is None else beat["at"])
        return (self._now() - last).total_seconds() < HEARTBEAT_DEAD_S

    # --- recipe, facts, result --------------------------------------------------------------------------------------

    def store_recipe(self, text: str) -> None:
        """Keep the recipe (redacted by the caller) of the run's first start; a later call changes nothing."""
        storage.create_exclusive(self.path("recipe.yaml"), text.encode())

    def replace_recipe(self, text: str, attempt: int) -> None:
        """The user accepted changes, which `attempt` is first to use: the old recipe stays as recipe.aN.yaml."""
        old = self.read_recipe()
        if old is not None:
            storage.create_exclusive(self.path(f"recipe.a{attempt}.yaml"), old.encode())
        storage.write_bytes(self.path("recipe.yaml"), text.encode())

    def read_recipe(self) -> str | None:
        """The stored recipe; None before the first start."""
        url = self.path("recipe.yaml")
        return storage.read_bytes(url).decode() if storage.exists(url) else None

    def record_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Fix what the first start decides for good (streams, seed, format version); returns what is fixed."""
        storage.create_exclusive(self.path("facts.json"), _to_json(facts))
        return self.read_facts() or dict(facts)

    def read_facts(self) -> dict[str, Any] | None:
        """What the first start fixed; None before it."""
        return _read_json(self.path("facts.json"))

    def write_environment(self, *, strategy: Mapping[str, Any] | None = None) -> None:
        """Keep the environment of the newest attempt; `strategy`: by what it lays the model out, once that is known."""
        known = {"strategy": strategy} if strategy else {}
        storage.write_bytes(self.path("environment.json"), _to_json({**describe_environment(), **known}))

    def read_environment(self) -> dict[str, Any]:
        """The environment of the newest attempt; empty before the first."""
        return _read_json(self.path("environment.json")) or {}

    def write_result(self, result: Mapping[str, Any]) -> None:
        """The run is finished: keep its summary. A run that was extended writes it again."""
        storage.write_bytes(self.path("result.json"), _to_json(result))

    def read_result(self) -> dict[str, Any] | None:
        """The summary of a finished run; None if it is not finished."""
        return _read_json(self.path("result.json"))

    # --- logs -------------------------------------------------------------------------------------------------------

    def open_events(self, attempt: int, secrets: Sequence[str] = ()) -> EventLog:
        """The event log, for rank 0."""
        return EventLog(self._open_log("events.jsonl", attempt), attempt, self._now, secrets)

    def open_metrics(self, attempt: int) -> LineLog:
        """The metrics log, for rank 0."""
        return self._open_log("metrics.jsonl", attempt)

    def _open_log(self, name: str, attempt: int) -> LineLog:
        return LineLog(self.path(name), is_ours=lambda: self.is_newest(attempt))


def describe_environment() -> dict[str, Any]:
    """Python, platform and the versions of all installed packages; imports none of them."""
    found = (_name_and_version(one) for one in importlib.metadata.distributions())
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": {name: version for name, version in sorted(found) if name},
    }


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    """Out of the first lines of its metadata: `Distribution.metadata` parses all of it as an e-mail each time it is
    asked, and takes ten times as long."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    fields = dict(line.partition(": ")[::2] for line in text.partition("\n\n")[0].splitlines())
    return fields.get("Name", ""), fields.get("Version", "")


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"


def _read_json(url: str) -> dict[str, Any] | None:
    """None if there is no such file. Raises UserError for one that is broken."""
    if not storage.exists(url):
        return None
    try:
        return dict(json.loads(storage.read_bytes(url)))
    except ValueError as error:
        raise UserError(f"{url} is broken ({error}). Begin a new run with --fresh, or restore the file.") from error
