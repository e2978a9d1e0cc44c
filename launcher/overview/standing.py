"""How a run stands, from its directory alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...distributed.run_directory import AttemptInfo, RunDirectory
from ..submissions import latest

WORDS = {"finished": "finished", "stopped_early": "stopped early", "failed": "failed", "interrupted": "interrupted"}


@dataclass(frozen=True)
class Tried:
    """One attempt and its end; None: it could not say, or lives."""

    info: AttemptInfo
    end: dict[str, Any] | None
    alive: bool

    @property
    def word(self) -> str:
        """`running`, how it ended, or `lost`."""
        if self.alive:
            return "running"
        return WORDS[self.end["outcome"]] if self.end else "lost"

    @property
    def message(self) -> str:
        """What it said at its end; empty where it said nothing."""
        return str(self.end["message"]).strip() if self.end else ""


@dataclass(frozen=True)
class Standing:
    """`word`: `running`, `finished`, `stopped early`, `interrupted`, `failed`, `lost` (killed, or its machine is gone);
    before the first attempt `queued` (submitted, and not begun), `starting`, or `unfinished`."""

    word: str
    tried: tuple[Tried, ...]

    @property
    def message(self) -> str:
        """Of the newest attempt, where the run has failed; empty otherwise."""
        return self.tried[-1].message if self.word == "failed" and self.tried else ""


def standing_of(run: RunDirectory) -> Standing:
    """Look at a run's attempts."""
    alive = {attempt.number for attempt in run.live_attempts()}
    tried = tuple(Tried(info, run.attempt_end(info.number), info.number in alive) for info in run.attempts())
    if alive:
        return Standing("running", tried)
    if (result := run.read_result()) is not None:
        return Standing(WORDS.get(str(result.get("outcome")), "finished"), tried)
    return Standing(tried[-1].word if tried else _before_attempts(run), tried)


def _before_attempts(run: RunDirectory) -> str:
    submission = latest(run)
    if submission is None:
        return "unfinished"
    if submission.exit_code is not None:
        return "failed" if submission.exit_code else "unfinished"
    return "starting" if "began_at" in submission.record else "queued"
