"""Which checkpoints stay, and how the others go: first the record, then the directory, so that a crash in between
leaves an orphan and never a commit without its files."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from .. import storage
from .commit import CommitRecord, Report, commit_url, directory_problem, list_commits, ranked


def steps_to_keep(records: Sequence[CommitRecord], *, keep_last: int, metric: str | None) -> set[int]:
    """The newest `keep_last` steps, and the best one by `metric`."""
    newest = sorted(record.step for record in records)[-keep_last:]
    best = [] if metric is None else [record.step for record in ranked(records, metric)[:1]]
    return {*newest, *best}


def orphans(
    names: Sequence[str], records: Sequence[CommitRecord], *, attempt: int, alive: Collection[int]
) -> list[str]:
    """Directories of attempts older than ours that no record names. An attempt in `alive` may still be saving."""
    committed = {record.directory for record in records}
    found = ((name, re.fullmatch(r"step-\d+\.a(\d+)", name)) for name in names)
    older = [(name, int(match[1])) for name, match in found if match and name not in committed]
    return [name for name, owner in older if owner < attempt and owner not in alive]


def apply_retention(
    run_url: str, *, keep_last: int, metric: str | None, attempt: int, alive: Collection[int], report: Report
) -> list[str]:
    """Delete what need not stay; returns the names of the directories that went. For one rank only.

    Only what could be resumed counts as kept: records of damaged or deleted directories would push whole checkpoints
    out. They stay as they are, for the user to look at."""
    names = storage.list_names(run_url)  # before the records: what is committed in between is not an orphan
    records = list_commits(run_url, report)
    whole = [record for record in records if directory_problem(run_url, record) is None]
    keep = steps_to_keep(whole, keep_last=keep_last, metric=metric)
    gone = orphans(names, records, attempt=attempt, alive=alive)
    for record in whole:
        if record.step not in keep:
            storage.delete_tree(commit_url(run_url, record.step))
            gone.append(record.directory)
    for name in gone:
        storage.delete_tree(storage.join(run_url, name))
    return gone
