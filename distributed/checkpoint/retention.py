"""Which checkpoints stay, and how the others go: first the record, then the directory, so that a crash in between
leaves an orphan and never a commit without its files."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...recipes.errors import FtlaunchError
from .. import storage
from ..storage_parts import PartUploads, takes_parts
from .commit import (
    CommitRecord,
    Report,
    commit_url,
    directories_set_aside,
    directory_problem,
    list_commits,
    ranked,
)
from .manifest import MANIFEST_NAME, TRAINING, read_manifest


@dataclass(frozen=True)
class Retention:
    """The newest `last` stay, steps that `every` divides, and the `best` by `metric`; of them the newest `resumable`
    with their training state."""

    last: int = 2
    every: int | None = None
    best: int = 0
    metric: str | None = None
    resumable: int = 1

    def steps(self, records: Sequence[CommitRecord]) -> set[int]:
        """The steps that stay."""
        newest = sorted(record.step for record in records)[-self.last :]
        multiples = [record.step for record in records if self.every and record.step % self.every == 0]
        best = [record.step for record in ranked(records, self.metric)[: self.best]] if self.metric else []
        return {*newest, *multiples, *best}


def orphans(
    names: Sequence[str], records: Sequence[CommitRecord], *, attempt: int, alive: Collection[int]
) -> list[str]:
    """Directories of attempts older than ours that no record names. An attempt in `alive` may still be saving."""
    committed = {record.directory for record in records}
    found = ((name, re.fullmatch(r"step-\d+\.a(\d+)", name)) for name in names)
    older = [(name, int(match[1])) for name, match in found if match and name not in committed]
    return [name for name, owner in older if owner < attempt and owner not in alive]


def apply_retention(
    run_url: str, retention: Retention, *, attempt: int, alive: Collection[int], report: Report
) -> list[str]:
    """Delete what need not stay; returns the names of the directories that went. For one rank only. Nothing goes where
    a newer attempt has committed: what the run keeps is for that one to say.

    Only what could be used counts as kept: records of damaged or deleted directories would push whole checkpoints
    out. They stay as they are, for the user to look at."""
    names = storage.list_names(run_url)  # before the records: what is committed in between is not an orphan
    records = list_commits(run_url, report)
    if any(record.attempt > attempt for record in records):
        return []
    whole = [record for record in records if directory_problem(run_url, record) is None]
    keep = retention.steps(whole)
    aside = directories_set_aside(run_url)
    gone = [name for name in orphans(names, records, attempt=attempt, alive=alive) if name not in aside]
    for record in whole:
        if record.step not in keep:
            storage.delete_tree(commit_url(run_url, record.step))
            gone.append(record.directory)
    for name in gone:
        storage.delete_tree(storage.join(run_url, name))
    _drop_training_state(run_url, [record for record in whole if record.step in keep], retention.resumable)
    return gone


def drop_unfinished_uploads(run_url: str, *, attempt: int, alive: Collection[int], report: Report) -> int:
    """Have the store forget uploads of attempts older than ours that were killed in a save: parts of what is no file
    are paid for. How many there were; a store that does not let us look is left as it is."""
    if attempt == 1 or not takes_parts(run_url):
        return 0
    uploads = PartUploads(run_url)
    below = run_url.rstrip("/") + "/"
    try:
        found = [(url, name, url.removeprefix(below).partition("/")[0]) for url, name in uploads.unfinished(run_url)]
    except FtlaunchError as error:
        report(f"Uploads that killed attempts may have left cannot be listed: {error}")
        return 0
    orphaned = set(orphans([folder for _, _, folder in found], (), attempt=attempt, alive=alive))
    left = [(url, name) for url, name, folder in found if folder in orphaned]
    for url, name in left:
        uploads.abort(url, name)
    return len(left)


def _drop_training_state(run_url: str, records: Sequence[CommitRecord], keep: int) -> None:
    """All but the newest that can be resumed keep their weights only. First the manifest no longer names the files:
    after a crash in between some lie there that nobody asks for, and the checkpoint is whole."""
    resumable = 0
    for record in sorted(records, key=lambda record: record.step, reverse=True):
        directory = storage.join(run_url, record.directory)
        manifest = read_manifest(directory)
        resumable += manifest.is_resumable
        if resumable > keep and manifest.is_resumable:
            storage.write_bytes(storage.join(directory, MANIFEST_NAME), manifest.weights_only().to_bytes())
        if resumable > keep or not manifest.is_resumable:
            storage.delete_tree(storage.join(directory, TRAINING))
