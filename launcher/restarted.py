"""A submitted job that its cluster starts again: KubeRay does after the loss of nodes, on others."""

from __future__ import annotations

import re
import time

from ..cluster.restarts import EARLY, LEFT_EARLY
from ..distributed import storage
from ..distributed.run_directory import HEARTBEAT_DEAD_S, RunDirectory
from ..recipes.errors import Interrupted
from ..recipes.load import LoadedRecipe
from . import submissions
from .submissions import Submission

POLL_S = 2.0
FINAL = (0, 1)
"""Exit codes that are answers: the run is done, or the user has something to mend."""

LOST = "the driver was lost with its node"


def earlier_of(run: RunDirectory, job: str) -> Submission | None:
    """This job, as an earlier driver of it has left it; None: there was none, and what is alive is somebody else's."""
    earlier = submissions.latest(run)
    if earlier is None or earlier.record["job"] != job or "began_at" not in earlier.record:
        return None
    return earlier


def name_of(loaded: LoadedRecipe, job: str) -> str | None:
    """Under which name a job that was to begin a fresh run has begun it; None: it has not."""
    place, stem = loaded.recipe.checkpoint.path, re.sub(r"-\d+$", "", loaded.recipe.name)  # as in `runs.fresh_name`
    names = [name for name in storage.list_names(place) if name.startswith(stem)]
    return next((name for name in names if earlier_of(RunDirectory(storage.join(place, name)), job)), None)


def answer_before(run: RunDirectory, earlier: Submission) -> int | None:
    """What an earlier driver has come to, if that is final; None: drive. Ranks of one that was lost are waited for, as
    long as they may still be alive: a sign of life of theirs may be two minutes old."""
    if earlier.exit_code in FINAL:
        return earlier.exit_code
    if earlier.record.get("ends_first"):
        for attempt in run.live_attempts():
            run.finish_attempt(attempt.number, "failed", "its job was ended")
        return None
    deadline_s = time.monotonic() + HEARTBEAT_DEAD_S + POLL_S
    while run.live_attempt() is not None and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return None


def why_again(earlier: Submission) -> str:
    """Why an earlier driver is followed by another one, on the run's budget; empty: at no cost to it, for that one was
    asked to leave, or has counted it itself."""
    if (left_with := earlier.record.get(submissions.LEFT_WITH)) is not None:
        return EARLY if left_with == LEFT_EARLY else ""
    if earlier.exit_code == Interrupted.exit_code:
        return ""
    return LOST if earlier.exit_code is None else f"its driver ended with exit code {earlier.exit_code}"
