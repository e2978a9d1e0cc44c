"""How a submitted job stands, asked of its cluster: what the run directory cannot know of a job that waits, or that was
ended before its driver could say so."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..cluster.table import find_submitted
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import FtlaunchError
from . import submissions
from .submissions import Submission

ASK_S = 30.0
"""Between questions while somebody only reads along."""


def ask(submission: Submission) -> str | None:
    """In words that go behind the job's name; None: it is over. Raises UserError and InfrastructureError where it
    cannot be asked."""
    cluster = find_submitted(submission.record)
    try:
        return cluster.standing()
    finally:
        cluster.down()


class IsOver:
    """Whether a run's newest submission is over. `clock` in seconds."""

    def __init__(self, run: RunDirectory, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._asked_s = clock()

    def __call__(self) -> bool:
        submission = submissions.newest(self._run)
        if submission.exit_code is not None:
            return True
        if self._clock() - self._asked_s < ASK_S:
            return False
        self._asked_s = self._clock()
        try:
            return ask(submission) is None
        except FtlaunchError:
            return False  # it may be there
