"""`ftlaunch pull RUN[@best|@latest|@STEP] DIR`: a checkpoint on this machine, verified byte for byte."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ..distributed import storage
from ..distributed.checkpoint.commit import CommitRecord, parse_reference, resolve
from ..distributed.checkpoint.manifest import MANIFEST_NAME, FileRecord, read_manifest
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import InfrastructureError, UserError
from ..recipes.load import parse_recipe_text
from . import units
from .runs import find_run

TRAINING = "training/"
COPY_BYTES = 16 * 2**20
"""Bytes held at once while a file is copied."""

Say = Callable[[str], None]


def pull(reference: str, folder: Path, *, training: bool) -> int:
    """Copy and verify; says where it lies. Raises UserError for a folder that is in use."""
    url, record = find_checkpoint(reference)
    copied = copy_checkpoint(storage.join(url, record.directory), folder, training=training, say=print)
    print(
        f"step {record.step}: {units.size(copied)} in {folder}, verified. Open it with from_pretrained({str(folder)!r})"
    )
    return 0


def find_checkpoint(reference: str) -> tuple[str, CommitRecord]:
    """(URL of the run, its commit) that RUN[@…] means. Raises UserError for a run or a step that is not there."""
    name, which = parse_reference(reference)
    url = find_run(name, Path.cwd())
    return url, resolve(url, which, print, metric=_early_stopping_metric(url) if which == "best" else None)


def _early_stopping_metric(url: str) -> str | None:
    """What decides which checkpoint of a run is the best, if its recipe says so."""
    text = RunDirectory(url).read_recipe()
    early = parse_recipe_text(text, url).evaluate.early_stopping if text else None
    return early.metric if early else None


def copy_checkpoint(source: str, folder: Path, *, training: bool, say: Say) -> int:
    """Copy the files that the manifest of `source` names, checking every span; returns the bytes copied.

    Raises UserError for a folder that is not empty, InfrastructureError for bytes that are not what was written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; pull into a new one")
    files = [file for file in read_manifest(source).files if training or not file.path.startswith(TRAINING)]
    for file in files:
        say(f"{file.path}  {units.size(file.size)}")
        _copy_file(source, file, folder / file.path)
    if training:  # whole, so that the folder is a checkpoint of its own
        (folder / MANIFEST_NAME).write_bytes(storage.read_bytes(storage.join(source, MANIFEST_NAME)))
    return sum(file.size for file in files)


def _copy_file(source: str, file: FileRecord, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    url = storage.join(source, file.path)
    with unfinished.open("wb") as out:
        for offset, length, crc32 in file.spans:
            out.seek(offset)
            checksum = 0
            for start, stop in _pieces(offset, offset + length):
                data = storage.read_range(url, start, stop)
                checksum = zlib.crc32(data, checksum)
                out.write(data)
            if checksum != crc32:
                raise InfrastructureError(
                    f"{url}: bytes {offset} to {offset + length} are not what was written; pull again, or another step"
                )
        _check_size(url, out.tell(), file.size)
    unfinished.replace(target)


def _pieces(start: int, stop: int) -> Sequence[tuple[int, int]]:
    return [(begin, min(begin + COPY_BYTES, stop)) for begin in range(start, stop, COPY_BYTES)]


def _check_size(url: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise InfrastructureError(f"{url}: {found} bytes are covered by checksums, {wanted} were written")
