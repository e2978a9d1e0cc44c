"""What is written and said at the end of a run."""

from __future__ import annotations

from rich.console import Console

from ..distributed import storage
from ..distributed.checkpoint.commit import latest
from ..distributed.run_directory import RunDirectory
from .history import read_record, write_report
from .runs import short_name
from .say import say
from .summary import show_summary, summarise


def sum_up(run: RunDirectory, console: Console) -> None:
    """Write report.html and print the summary of a run that has ended."""
    report = write_report(run, run.status())
    commit = latest(run.url, lambda line: say(console, line, "yellow"))
    checkpoint = storage.join(run.url, commit.directory) if commit else ""
    show_summary(summarise(read_record(run), run=short_name(run.url), checkpoint=checkpoint, report=report), console)
