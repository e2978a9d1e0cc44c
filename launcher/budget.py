"""A run's failures, and how many more it may have: one budget for all who start it again, kept in the run directory.

failures/NNN.json    one each, written by whoever starts the run again: the driver for its ranks, what looks after the
                     driver for the driver, a scheduler for the whole job

A run may fail `limit` times without getting further: a newer checkpoint makes the budget whole again, so that a run of
weeks is not ended by a failure a day, while one that fails at the same place over and over is. A command that a person
gives begins anew (`launch`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Literal

from ..distributed import storage
from ..distributed.checkpoint.commit import latest_resumable
from ..distributed.run_directory import RunDirectory, utc_now
from ..recipes.errors import FtlaunchError
from .failure import Failure

FOLDER = "failures"

By = Literal["ranks", "driver", "job"]
"""What was started again."""


@dataclass(frozen=True)
class Entry:
    """One failure. `step`: that of the newest checkpoint at the time, from which the run went on; None: there was none.
    `counts`: whether it drew on the budget. `avoid`: whether its node is to be left out, where there are others."""

    number: int
    at: str
    launch: str
    by: By
    kind: str
    says: str
    rank: int | None
    node: str | None
    step: int | None
    counts: bool
    avoid: bool


@dataclass(frozen=True)
class Account:
    """How the budget stands behind a failure. `step`: from which the run goes on, if it does; None: its beginning."""

    used: int
    limit: int
    step: int | None

    @property
    def is_spent(self) -> bool:
        """Whether the run is not to be started again."""
        return self.used > self.limit

    @property
    def where(self) -> str:
        """From where it goes on."""
        return "from the beginning: there is no checkpoint yet" if self.step is None else f"from step {self.step}"


def used(entries: Sequence[Entry], launch: str, step: int | None) -> int:
    """Failures of a launch since its newest checkpoint, that of `step`."""
    return sum(entry.counts and entry.launch == launch and entry.step == step for entry in entries)


def bad_nodes(entries: Sequence[Entry], launch: str) -> list[str]:
    """Names of nodes to leave out where there are others: broken ones, and those on which ranks died twice."""
    mine = [entry for entry in entries if entry.launch == launch and entry.node and entry.counts]
    counted = [str(entry.node) for entry in mine if entry.kind in ("killed", "unknown", "start")]
    broken = {str(entry.node) for entry in mine if entry.avoid}
    return sorted(broken | {node for node in counted if counted.count(node) > 1})


class Budget:
    """Of one launch of a run. Where the run directory cannot be written, it is kept here."""

    def __init__(self, run: RunDirectory, launch: str, limit: int, now: Callable[[], datetime] = utc_now) -> None:
        self.launch = launch
        self._run, self._limit, self._now = run, limit, now
        self._entries: list[Entry] = []

    def entries(self) -> list[Entry]:
        """All failures of the run, oldest first."""
        try:
            stored = read_failures(self._run)
        except FtlaunchError:
            stored = []
        known = {entry.number for entry in stored}
        return sorted([*stored, *(one for one in self._entries if one.number not in known)], key=lambda one: one.number)

    def bad_nodes(self) -> list[str]:
        """See `bad_nodes`."""
        return bad_nodes(self.entries(), self.launch)

    def spend(self, failure: Failure, by: By) -> Account:
        """Write a failure down; says how the budget stands then."""
        entries, step = self.entries(), self._newest_step()
        entry = Entry(
            number=1 + max((one.number for one in entries), default=0),
            at=self._now().isoformat(timespec="seconds"),
            launch=self.launch,
            by=by,
            kind=failure.kind,
            says=failure.says,
            rank=failure.rank,
            node=failure.node,
            step=step,
            counts=failure.counts,
            avoid=failure.response == "elsewhere",
        )
        self._keep(entry)
        return Account(used([*entries, entry], self.launch, step), self._limit, step)

    def _newest_step(self) -> int | None:
        try:
            newest = latest_resumable(self._run.url, lambda _: None)
        except FtlaunchError:
            return self._entries[-1].step if self._entries else None
        return newest.step if newest else None

    def _keep(self, entry: Entry) -> None:
        self._entries.append(entry)
        text = json.dumps(asdict(entry), indent=2).encode() + b"\n"
        try:
            storage.write_bytes(self._run.path(FOLDER, f"{entry.number:03d}.json"), text)
        except FtlaunchError:
            return  # the store itself may be what failed


def read_failures(run: RunDirectory) -> list[Entry]:
    """A run's failures, oldest first. Raises UserError and InfrastructureError."""
    names = sorted(name for name in storage.list_names(run.path(FOLDER)) if name.endswith(".json"))
    return [Entry(**json.loads(storage.read_bytes(run.path(FOLDER, name)))) for name in names]
