"""`ftlaunch pull RUN[@best|@latest|@STEP] DIR`: a checkpoint on this machine, verified byte for byte."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..distributed import storage
from ..distributed.checkpoint.commit import CommitRecord, parse_reference, resolve
from ..distributed.checkpoint.manifest import MANIFEST_NAME, TRAINING, FileRecord, Span, read_manifest
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import InfrastructureError, UserError
from ..recipes.load import parse_recipe_text
from ..recipes.naming import best_metric
from . import units
from .runs import find_run

COPY_BYTES = 16 * 2**20
CONNECTIONS = 8
"""Spans copied at once, each holding `COPY_BYTES`."""

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
    return url, resolve(url, which, metric=metric_of(url) if which == "best" else None)


def metric_of(url: str) -> str | None:
    """What decides which checkpoint of a run is the best, as far as its recipe says it."""
    text = RunDirectory(url).read_recipe()
    return best_metric(parse_recipe_text(text, url)) if text else None


def copy_checkpoint(source: str, folder: Path, *, training: bool, say: Say) -> int:
    """Copy the files that the manifest of `source` names, checking every span; returns the bytes copied.

    Raises UserError for a folder that is not empty, InfrastructureError for bytes that are not what was written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; pull into a new one")
    manifest = read_manifest(source)
    if training and not manifest.is_resumable:
        raise UserError(f"{source} holds its weights only (checkpoint.keep_training_state): leave --training out.")
    files = [file for file in manifest.files if training or not file.path.startswith(TRAINING)]
    _copy_files(source, files, folder, say)
    if training:  # whole, so that the folder is a checkpoint of its own
        (folder / MANIFEST_NAME).write_bytes(storage.read_bytes(storage.join(source, MANIFEST_NAME)))
    return sum(file.size for file in files)


def _copy_files(source: str, files: Sequence[FileRecord], folder: Path, say: Say) -> None:
    """Several spans at once, of one file or of many; a file has its name only when all of it is there and verified."""
    for file in files:
        _begin(file, folder, storage.join(source, file.path))
    spans = [(file, span) for file in files for span in file.spans]
    missing = Counter(file.path for file, _ in spans)
    total, copied = max(1, sum(file.size for file in files)), 0
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="pull") as pool:
        copies = pool.map(lambda one: _copy_span(source, one[0], one[1], folder), spans)
        for (file, span), _ in zip(spans, copies, strict=True):
            copied += span.length
            missing[file.path] -= 1
            if not missing[file.path]:
                _unfinished(file, folder).replace(folder / file.path)
                say(f"{copied / total:4.0%}  {file.path}  {units.size(file.size)}")


def _unfinished(file: FileRecord, folder: Path) -> Path:
    target = folder / file.path
    return target.with_name(f".{target.name}.unfinished")


def _begin(file: FileRecord, folder: Path, url: str) -> None:
    """Make the file at its full length, so that spans can be written in any order; one without bytes is done."""
    covered = sum(span.length for span in file.spans)
    if covered != file.size:
        raise InfrastructureError(f"{url}: {covered} bytes are covered by checksums, {file.size} were written")
    unfinished = _unfinished(file, folder)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as out:
        out.truncate(file.size)
    if not file.size:
        unfinished.replace(folder / file.path)


def _copy_span(source: str, file: FileRecord, span: Span, folder: Path) -> None:
    url = storage.join(source, file.path)
    stop = span.offset + span.length
    checksum = 0
    with _unfinished(file, folder).open("r+b") as out:
        out.seek(span.offset)
        for begin in range(span.offset, stop, COPY_BYTES):
            data = storage.read_range(url, begin, min(begin + COPY_BYTES, stop))
            checksum = zlib.crc32(data, checksum)
            out.write(data)
    if checksum != span.crc32:
        raise InfrastructureError(
            f"{url}: bytes {span.offset} to {stop} are not what was written; pull again, or another step"
        )
