"""Which checkpoints a word on the command line means: RUN, RUN@STEP, RUN@best, or the folder of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..distributed import storage
from ..distributed.checkpoint.commit import CommitRecord, list_commits, parse_reference, ranked
from ..distributed.checkpoint.manifest import MANIFEST_NAME
from ..recipes.errors import UserError
from .generate import is_model_folder
from .pull import find_checkpoint, metric_of
from .runs import find_run


class Located(NamedTuple):
    """A checkpoint's folder, and the run that it lies in, if it does."""

    directory: str
    run: str | None


def locate(reference: str) -> Located:
    """One usable checkpoint, as `pull` and `generate` find it. Raises UserError."""
    if _is_checkpoint(reference):
        return Located(reference.rstrip("/"), _run_around(reference))
    url, record = find_checkpoint(reference)
    return Located(storage.join(url, record.directory), url)


def locate_all(reference: str, report: Callable[[str], None]) -> list[Located]:
    """RUN means all of its committed checkpoints here, newest first, and nothing is passed over because it is damaged;
    records that cannot be read are reported. Raises UserError where there is none."""
    if _is_checkpoint(reference):
        return [Located(reference.rstrip("/"), _run_around(reference))]
    name, which = parse_reference(reference)
    url = find_run(name, Path.cwd())
    records = list_commits(url, report)[::-1]
    chosen = records if name == reference else _chosen(url, records, which)
    if not chosen:
        there = ", ".join(str(record.step) for record in records[::-1]) or "none"
        raise UserError(f"{reference}: there is no such checkpoint. Committed steps: {there}.")
    return [Located(storage.join(url, record.directory), url) for record in chosen]


def _chosen(url: str, records: list[CommitRecord], which: str | int) -> list[CommitRecord]:
    if which == "latest":
        return records[:1]
    if which == "best":
        metric = metric_of(url)
        return ranked(records, metric)[:1] if metric else []
    return [record for record in records if record.step == which]


def _is_checkpoint(reference: str) -> bool:
    """Whether it is a checkpoint's folder. Raises UserError for a model's folder that was made without a manifest."""
    if not storage.is_local(reference):
        return storage.exists(storage.join(reference, MANIFEST_NAME))
    folder = storage.local_path(reference)
    if (folder / MANIFEST_NAME).is_file():
        return True
    if is_model_folder(folder):
        raise UserError(
            f"{reference} has no {MANIFEST_NAME}, so nothing says what was written there: name the run's own "
            "checkpoint (RUN or RUN@STEP), or pull it with --training"
        )
    return False


def _run_around(directory: str) -> str | None:
    parent = directory.rstrip("/").rpartition("/")[0] or "."
    return parent if storage.exists(storage.join(parent, "recipe.yaml")) else None
