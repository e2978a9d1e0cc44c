"""A submitted job that its cluster starts again: KubeRay does after the loss of nodes, on others."""

from __future__ import annotations

import time

from ..distributed.run_directory import HEARTBEAT_DEAD_S, RunDirectory
from . import submissions

POLL_S = 2.0
FINAL = (0, 1)
"""Exit codes that are answers: the run is done, or the user has something to mend."""


def answer_before(run: RunDirectory, job: str) -> int | None:
    """What an earlier driver of this job has come to, if that is final; None: drive. Ranks of one that was lost are
    waited for, as long as they may still be alive: a sign of life of theirs may be two minutes old."""
    earlier = submissions.latest(run)
    if earlier is None or earlier.record["job"] != job or "began_at" not in earlier.record:
        return None  # its first driver; what is alive then is somebody else's
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
