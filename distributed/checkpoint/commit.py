"""Which checkpoints exist: those that a commit record names. A directory without one does not exist.

A record is created exclusively, so of two attempts that save the same step exactly one wins. After that it never
changes, but for losses that are measured later and added to one that has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from ...recipes.errors import UserError
from .. import storage
from .manifest import read_manifest
from .verify import size_problems

COMMITS = "commits"

ASIDE = ".damaged.json"

NO_LONGER_KEPT = frozenset({"recipe_digest"})
"""In records of earlier versions; it was always empty."""

Report = Callable[[str], None]
"""Takes one line about a commit that is passed over; nothing is skipped silently."""


@dataclass(frozen=True)
class CommitRecord:
    """A checkpoint that counts.

    `directory` is its name below the run; `metrics` the evaluation losses at its step; `created_at` ISO 8601 in UTC.
    By which recipe it was made, `attempt` tells: the run keeps what each attempt changed.
    """

    step: int
    attempt: int
    directory: str
    created_at: str
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As it is stored."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=2).encode() + b"\n"


def directory_name(step: int, attempt: int) -> str:
    """`step-000200.a1`: one attempt's own directory for one step."""
    return f"step-{step:06d}.a{attempt}"


def commit_url(run_url: str, step: int) -> str:
    """Where the record of `step` lies."""
    return storage.join(run_url, COMMITS, f"step-{step:06d}.json")


def read_commit(run_url: str, step: int) -> CommitRecord | None:
    """The record of a step; None if it was never committed. Raises UserError if it cannot be read."""
    url = commit_url(run_url, step)
    if not storage.exists(url):
        return None
    try:
        stored = json.loads(storage.read_bytes(url))
        return CommitRecord(**{name: value for name, value in stored.items() if name not in NO_LONGER_KEPT})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{url} is no commit record ({error}): delete it to do without this checkpoint.") from error


def commit(run_url: str, record: CommitRecord) -> CommitRecord:
    """Make a checkpoint exist. Returns the record that counts: ours, or that of an attempt that was first."""
    if storage.create_exclusive(commit_url(run_url, record.step), record.to_bytes()):
        return record
    # An answer that got lost may hide our own success, so what is stored decides.
    return read_commit(run_url, record.step) or record


def add_metrics(run_url: str, step: int, metrics: Mapping[str, float]) -> None:
    """Give the record of a step, if it has none, losses that were measured after it was committed: without them the
    best checkpoint would be looked for among the others."""
    record = read_commit(run_url, step)
    if record is not None and not record.metrics:
        storage.write_bytes(commit_url(run_url, step), replace(record, metrics=dict(metrics)).to_bytes())


def list_commits(run_url: str, report: Report) -> list[CommitRecord]:
    """All commits by step. A record that cannot be read is reported and left out."""
    records = []
    for step in _steps(run_url):
        try:
            record = read_commit(run_url, step)
        except UserError as error:
            report(str(error))
            continue
        if record is not None:  # None: deleted since it was listed
            records.append(record)
    return records


def _steps(run_url: str) -> list[int]:
    names = storage.list_names(storage.join(run_url, COMMITS))
    return sorted(int(match[1]) for match in (re.fullmatch(r"step-(\d+)\.json", name) for name in names) if match)


def usable(run_url: str, records: Sequence[CommitRecord], report: Report) -> Iterator[CommitRecord]:
    """The records whose directory is whole, by manifest and file sizes; the others are reported and left out."""
    for record in records:
        problem = directory_problem(run_url, record)
        if problem is None:
            yield record
        else:
            report(f"checkpoint of step {record.step} is not usable: {problem}")


def directory_problem(run_url: str, record: CommitRecord) -> str | None:
    """What is wrong with a committed directory, without reading its tensors; None if nothing."""
    directory = storage.join(run_url, record.directory)
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        return str(error)
    if (manifest.step, manifest.attempt) != (record.step, record.attempt):
        return f"{directory} holds step {manifest.step} of attempt {manifest.attempt}, not what was committed"
    return next(iter(size_problems(directory, manifest.files)), None)


def latest(run_url: str, report: Report) -> CommitRecord | None:
    """The newest usable commit."""
    return next(usable(run_url, list_commits(run_url, report)[::-1], report), None)


def set_aside(run_url: str, record: CommitRecord) -> None:
    """A commit that proved damaged counts no more. Its directory stays, and so does the record, under another name."""
    storage.write_bytes(storage.join(run_url, COMMITS, f"{record.directory}{ASIDE}"), record.to_bytes())
    storage.delete_tree(commit_url(run_url, record.step))


def directories_set_aside(run_url: str) -> set[str]:
    """Names of the directories of commits that were set aside."""
    names = storage.list_names(storage.join(run_url, COMMITS))
    return {name.removesuffix(ASIDE) for name in names if name.endswith(ASIDE)}


def latest_resumable(run_url: str, report: Report, before: int | None = None) -> CommitRecord | None:
    """The newest usable commit that training can go on from; with `before` the newest of earlier steps."""
    records = [record for record in list_commits(run_url, report) if before is None or record.step < before]
    for record in usable(run_url, records[::-1], report):
        if read_manifest(storage.join(run_url, record.directory)).is_resumable:
            return record
        report(f"checkpoint of step {record.step} holds its weights only: training cannot go on from it")
    return None


def ranked(records: Sequence[CommitRecord], metric: str) -> list[CommitRecord]:
    """The records that know `metric`, lowest first; of equal ones the earliest."""
    known = [record for record in records if metric in record.metrics]
    return sorted(known, key=lambda record: (record.metrics[metric], record.step))


def best(run_url: str, metric: str, report: Report) -> CommitRecord | None:
    """The usable commit with the lowest `metric`."""
    return next(usable(run_url, ranked(list_commits(run_url, report), metric), report), None)


# --- RUN@WHICH ------------------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """`run` as the user named it (a name or URL); `which` is "latest", "best" or a step."""

    run: str
    which: str | int


def parse_reference(text: str) -> Reference:
    """Read RUN, RUN@latest, RUN@best, RUN@200 or RUN@step-000200; without @ the latest is meant.

    Raises UserError for anything else after the @.
    """
    run, at, which = text.rpartition("@")
    if not at or "/" in which:  # an @ in the host part of a URL
        return Reference(text, "latest")
    if which in ("latest", "best"):
        return Reference(run, which)
    step = re.fullmatch(r"(?:step-)?(\d+)", which)
    if not run or step is None:
        raise UserError(f"{text}: after the @ comes best, latest, or a step such as 200 or step-000200.")
    return Reference(run, int(step[1]))


def resolve(run_url: str, which: str | int, *, metric: str | None = None) -> CommitRecord:
    """The commit that a reference means. `metric` decides what best is; None: the only metric there is.

    Raises UserError that says which commits there are, and for a damaged one: another is taken only when it is named.
    """
    unreadable: list[str] = []
    records = list_commits(run_url, unreadable.append)
    if unreadable and not isinstance(which, int):
        raise UserError("\n".join([*unreadable, _others(run_url, records)]))
    if which == "latest":
        chosen = records[::-1]
    elif which == "best":
        chosen = ranked(records, metric or _only_metric(run_url, records))
    else:
        chosen = [record for record in records if record.step == which]
    if not chosen:
        there = ", ".join(str(record.step) for record in records) or "none"
        raise UserError(f"{run_url} has no checkpoint for @{which}. Committed steps: {there}.")
    if (problem := directory_problem(run_url, chosen[0])) is not None:
        raise UserError(f"checkpoint of step {chosen[0].step} is not usable: {problem}\n{_others(run_url, records)}")
    return chosen[0]


def _others(run_url: str, records: Sequence[CommitRecord]) -> str:
    whole = list(usable(run_url, records, lambda _: None))
    if not whole:
        return "No other checkpoint of this run is whole."
    steps = ", ".join(str(record.step) for record in whole)
    return f"Name another one to take it instead: whole are those of steps {steps} ({run_url}/{whole[-1].directory})."


def _only_metric(run_url: str, records: Sequence[CommitRecord]) -> str:
    names = sorted({name for record in records for name in record.metrics})
    if len(names) != 1:
        listed = ", ".join(names) or "none was measured"
        raise UserError(f"{run_url}: @best needs one metric to compare by, there is: {listed}. Name a step instead.")
    return names[0]
