"""When a run's attempts lived, and how long it waited to be started: read from the run directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from ...distributed.run_directory import AttemptInfo, RunDirectory
from ..budget import read_failures
from ..record import Line
from ..submissions import Submission, all_submissions
from .ledger import Ledger, Life, Wait, make_ledger


def read_ledger(run: RunDirectory, metrics: Iterable[Line], events: Iterable[Line], now_s: float) -> Ledger:
    """The ledger of a run with these lines; `now_s` in seconds since 1970."""
    metrics, events = list(metrics), list(events)
    alive = {attempt.number for attempt in run.live_attempts()}
    signs = _last_lines(metrics, events)
    lives = [
        Life(attempt.number, attempt.began_s, now_s, "alive")
        if attempt.number in alive
        else _ended(run, attempt, signs)
        for attempt in run.attempts()
    ]
    waits = [wait for submission in all_submissions(run) if (wait := _wait(submission))]
    failures = [_seconds(failure.at) for failure in read_failures(run)]
    return make_ledger(lives, waits, metrics, events, failures)


def _ended(run: RunDirectory, attempt: AttemptInfo, signs: Mapping[int, float]) -> Life:
    end = run.attempt_end(attempt.number)
    if end is not None:
        return Life(attempt.number, attempt.began_s, _seconds(end["ended_at"]), str(end["outcome"]))
    beat = run.last_beat(attempt.number)
    last = [attempt.began_s, signs.get(attempt.number, 0.0), *([_seconds(beat["at"])] if beat else [])]
    return Life(attempt.number, attempt.began_s, max(last), None)


def _last_lines(metrics: Iterable[Line], events: Iterable[Line]) -> dict[int, float]:
    """When each attempt last wrote a line."""
    last: dict[int, float] = {}
    for line in metrics:
        if "time" in line:
            last[int(line["attempt"])] = float(line["time"])
    for event in events:
        number = int(event["attempt"])
        last[number] = max(last.get(number, 0.0), _seconds(str(event["time"])))
    return last


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _wait(submission: Submission) -> Wait | None:
    """None for one that does not say both."""
    record = submission.record
    if "submitted_at" not in record or "began_at" not in record:
        return None
    return Wait(float(record["submitted_at"]), float(record["began_at"]))
