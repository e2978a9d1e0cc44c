"""`ftlaunch logs RUN`: what a run has printed, read from its directory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from ..distributed import storage
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import UserError
from . import submissions
from .job_state import IsOver
from .log_copy import COPY_LOCAL_S
from .rank_log import FOLDER, rank_log_url


def show_logs(run: RunDirectory, rank: int | None, *, follow_it: bool) -> int:
    """Print the newest submission's driver, or one rank of the newest attempt. Raises UserError where there is
    nothing of the kind."""
    if rank is None and submissions.latest(run) is None:
        rank = 0  # it was driven from a terminal, which has shown the rest
    if rank is None:
        name = submissions.newest(run).name
        _show(submissions.log_url(run, name), IsOver(run), follow_it)
    else:
        _show(_rank_log(run, rank), lambda: run.live_attempt() is None, follow_it)
    return 0


def _rank_log(run: RunDirectory, rank: int) -> str:
    """Of the newest attempt that got so far as to have one."""
    numbers = [attempt.number for attempt in reversed(run.attempts())]
    for number in numbers:
        if storage.exists(url := rank_log_url(run, number, rank)):
            return url
    there = sorted(storage.list_names(run.path(FOLDER)))
    ranks = sorted({name.partition("rank-")[2].removesuffix(".log").lstrip("0") or "0" for name in there}, key=int)
    said = f"there are those of ranks {', '.join(ranks)}" if ranks else "ranks under torchrun print where they run"
    raise UserError(f"{run.url} keeps nothing that rank {rank} printed; {said}")


def _show(url: str, over: Callable[[], bool], follow_it: bool) -> None:
    shown = 0
    while True:
        ended = over()  # before the log is read: then it is whole
        text = storage.read_bytes(url) if storage.exists(url) else b""
        sys.stdout.write(text[shown:].decode(errors="replace"))
        sys.stdout.flush()
        shown = len(text)
        if ended or not follow_it:
            return
        time.sleep(COPY_LOCAL_S)
