"""`ftlaunch status RUN`: how far a run is, how it got there, and where its time went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..distributed.checkpoint.commit import list_commits
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import FtlaunchError
from .budget import read_failures
from .goodput.bar import SMALL_S, ledger_line
from .history import History, read_history
from .job_state import ask
from .overview.standing import Standing, Tried, standing_of
from .runs import find_run
from .submissions import Submission, latest
from .view import losses_line, step_line

SHOWN_ATTEMPTS = 8


def show_status(text: str, *, as_json: bool = False) -> int:
    """Print state, last step, losses, checkpoints, attempts and goodput. Raises UserError where there is no such
    run."""
    run = RunDirectory(find_run(text, Path.cwd()))
    print(json.dumps(status_values(run), indent=2) if as_json else "\n".join(status_lines(run)))
    return 0


def status_lines(run: RunDirectory) -> list[str]:
    """The lines that describe a run."""
    history, submission, standing = read_history(run), latest(run), standing_of(run)
    record = history.record
    lines = [f"{run.url}: {_state(standing)}"]
    lines += standing.message.splitlines()
    if submission:
        lines.append(f"submitted as job {submission.record['job']}, {_where(submission)}")
    if record.steps:
        lines.append(step_line(record.steps[-1], None))
    if record.evaluations:
        evaluated = record.evaluations[-1]
        lines.append(f"evaluated at step {evaluated.step}: {losses_line(evaluated.losses)}")
    if failures := read_failures(run):
        last = failures[-1]
        lines.append(f"failed and went on {len(failures)} times, last at {last.at}: {last.says}")
    problems: list[str] = []
    commits = list_commits(run.url, problems.append)
    steps = ", ".join(str(commit.step) for commit in commits) or "none"
    lines += [f"checkpoints: {steps}", *problems, *_attempt_lines(standing)]
    return [*lines, *([ledger_line(history.ledger)] if history.ledger.total_s >= SMALL_S else [])]


def _where(submission: Submission) -> str:
    """Where a submission is driven; what its cluster says of it before it has begun."""
    if submission.record["driver"]:
        return f"driven on {submission.record['driver']}"
    try:
        return ask(submission) or "which is over"
    except FtlaunchError as error:
        return f"which cannot be asked: {error}"


def _state(standing: Standing) -> str:
    if standing.word == "running":
        alive = next(tried.info for tried in reversed(standing.tried) if tried.alive)
        return f"running, attempt {alive.number} on {alive.process.host} (process {alive.process.pid})"
    if standing.word in ("interrupted", "failed", "lost"):
        return f"unfinished ({standing.word})"
    return standing.word


def _attempt_lines(standing: Standing) -> list[str]:
    """One for each of the newest attempts, where there are several."""
    if len(standing.tried) < 2:
        return []
    hidden = len(standing.tried) - SHOWN_ATTEMPTS
    lines = [f"attempts: {len(standing.tried)}" + (f", the last {SHOWN_ATTEMPTS} of them" if hidden > 0 else "")]
    return [*lines, *(_attempt_line(tried) for tried in standing.tried[-SHOWN_ATTEMPTS:])]


def _attempt_line(tried: Tried) -> str:
    info = tried.info
    ranks = "1 rank" if info.world_size == 1 else f"{info.world_size} ranks"
    said = tried.message.splitlines()
    line = f"  {info.number}  {info.started_at[:19]}  {ranks}, rank 0 on {info.process.host}: {tried.word}"
    return f"{line}: {said[0]}" if said and tried.word == "failed" else line


def status_values(run: RunDirectory) -> dict[str, Any]:
    """The same for programs."""
    history, submission, standing = read_history(run), latest(run), standing_of(run)
    record = history.record
    last = record.evaluations[-1] if record.evaluations else None
    return {
        "run": run.url,
        "state": standing.word,
        "message": standing.message,
        "submission": _submission_values(submission),
        "step": dict(record.steps[-1]) if record.steps else None,
        "evaluation": {"step": last.step, "losses": dict(last.losses)} if last else None,
        "checkpoints": [commit.step for commit in list_commits(run.url, lambda _: None)],
        "attempts": [_attempt_values(tried) for tried in standing.tried],
        "goodput": _goodput_values(history),
    }


def _submission_values(submission: Submission | None) -> dict[str, Any] | None:
    if submission is None:
        return None
    record = submission.record
    return {"job": record["job"], "driver": record["driver"], "exit_code": submission.exit_code}


def _attempt_values(tried: Tried) -> dict[str, Any]:
    info = tried.info
    return {
        "number": info.number,
        "started_at": info.started_at,
        "world_size": info.world_size,
        "host": info.process.host,
        "state": tried.word,
        "message": tried.message,
    }


def _goodput_values(history: History) -> dict[str, Any]:
    ledger = history.ledger
    return {
        "goodput": ledger.goodput,
        "total_s": ledger.total_s,
        "paused_s": ledger.paused_s,
        "seconds": dict(ledger.seconds),
    }
