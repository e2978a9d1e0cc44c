"""`ftlaunch status RUN`: how far a run is, in a few lines."""

from __future__ import annotations

from pathlib import Path

from ..distributed.checkpoint.commit import list_commits
from ..distributed.run_directory import RunDirectory
from .history import read_record
from .runs import find_run
from .submissions import latest
from .view import losses_line, step_line


def show_status(text: str) -> int:
    """Print state, last step, last losses and checkpoints. Raises UserError where there is no such run."""
    run = RunDirectory(find_run(text, Path.cwd()))
    print("\n".join(status_lines(run)))
    return 0


def status_lines(run: RunDirectory) -> list[str]:
    """The lines that describe a run."""
    record, submission = read_record(run), latest(run)
    lines = [f"{run.url}: {_state(run)}"]
    if submission:
        lines.append(f"submitted as job {submission.record['job']}, driven on {submission.record['driver']}")
    if record.steps:
        lines.append(step_line(record.steps[-1], None))
    if record.evaluations:
        last = record.evaluations[-1]
        lines.append(f"evaluated at step {last.step}: {losses_line(last.losses)}")
    problems: list[str] = []
    commits = list_commits(run.url, problems.append)
    steps = ", ".join(str(commit.step) for commit in commits) or "none"
    return [*lines, f"checkpoints: {steps}", *problems]


def _state(run: RunDirectory) -> str:
    alive = run.live_attempt()
    if alive is None:
        return run.status()
    return f"running, attempt {alive.number} on {alive.process.host} (process {alive.process.pid})"
