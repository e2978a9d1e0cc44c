"""Where an export or an import goes: an empty place, or one where it was broken off, which is then gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..distributed import storage
from ..distributed.checkpoint.layout import FileSet
from ..distributed.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, Span, record_bytes
from ..distributed.checkpoint.save import folder_of, path_of
from ..distributed.checkpoint.verify import sample_problems, size_problems
from ..distributed.merging import TensorStream
from ..distributed.model_writer import write_weights
from ..recipes.errors import InfrastructureError, UserError
from .check_progress import Counted, byte_progress


class Kind(NamedTuple):
    """What is made. `note`: the file that makes a folder one of ours; until there is a manifest it also says which
    files are done."""

    noun: str
    note: str


EXPORT = Kind("export", "EXPORT.json")
IMPORT = Kind("import", "IMPORT.json")


@dataclass
class Target:
    """A folder that is being written."""

    url: str
    identity: Mapping[str, Any]
    planned: Sequence[str]
    """Names of all files but the manifest and the note."""
    records: dict[str, FileRecord] = field(default_factory=dict)
    """Files that are there, whole."""
    kind: Kind = EXPORT

    @classmethod
    def begin(
        cls, url: str, identity: Mapping[str, Any], planned: Sequence[str], *, overwrite: bool, kind: Kind = EXPORT
    ) -> Target:
        """Raises UserError for a place that holds anything but one of our kind that may be gone on with. Files that
        are not ours are never deleted."""
        if storage.exists(url) and not storage.is_folder(url):
            raise UserError(f"--to {url} is a file; name a new or empty folder")
        storage.check_writable(url, setting="--to")
        names = set(storage.list_names(url))
        note = _read_note(url, kind) if kind.note in names else None
        finished = MANIFEST_NAME in names
        target = cls(url, identity, planned, kind=kind)
        if note is None and names:
            listed = ", ".join(sorted(names)[:5])
            raise UserError(f"--to {url}: something else is there already ({listed}); name a new or empty place")
        if note is not None and not finished and note["identity"] == identity:
            target.records = {name: _record(name, raw) for name, raw in note["files"].items()}
        elif note is not None and not overwrite:
            state = f"a finished {kind.noun}" if finished else f"another {kind.noun} that was broken off"
            raise UserError(
                f"--to {url}: {state} is there already; name another place, or write over it with --overwrite"
            )
        elif note is not None:
            _clear(url, note["planned"])
        target._clear_temporaries(names)
        target._write_note()
        return target

    def has(self, path: str, size: int) -> bool:
        """Whether an earlier attempt that was broken off wrote a file, whole."""
        record = self.records.get(path)
        if record is None or record.size != size:
            return False
        try:
            return storage.info(storage.join(self.url, path)).size == size
        except UserError:
            return False

    def add(self, record: FileRecord) -> None:
        """A file is written: it has not to be again."""
        self.records[record.path] = record
        self._write_note()

    def finish(self, manifest: Manifest) -> None:
        """All is there; from now on it can be verified."""
        note = storage.read_bytes(storage.join(self.url, self.kind.note))
        files = sorted((*manifest.files, record_bytes(self.kind.note, note)), key=lambda file: file.path)
        whole = Manifest(manifest.step, manifest.attempt, tuple(files))
        storage.write_bytes(storage.join(self.url, MANIFEST_NAME), whole.to_bytes())

    def _write_note(self) -> None:
        files = {name: {"size": record.size, "spans": record.spans} for name, record in self.records.items()}
        content = {"format": 1, "identity": dict(self.identity), "planned": list(self.planned), "files": files}
        storage.write_bytes(storage.join(self.url, self.kind.note), json.dumps(content).encode() + b"\n")

    def _clear_temporaries(self, names: set[str]) -> None:
        """What a process that was killed was writing."""
        for name in names:
            if name.startswith(".") and name.endswith(".tmp"):
                storage.delete_tree(storage.join(self.url, name))


class Part(NamedTuple):
    """A stem ("model", "master", ...), its tensors and its files."""

    stem: str
    tensors: TensorStream
    files: FileSet


def write_all(target: Target, parts: Sequence[Part], small: Mapping[str, bytes]) -> list[FileRecord]:
    """Tensors first, so that nobody takes the folder for a model before it is one; then the `small` files, by path."""
    files = [(part, file) for part in parts for file in part.files.files]
    progress = byte_progress()
    counted = Counted(progress, "writing", sum(file.size for _, file in files))
    try:
        for part, file in files:
            path = path_of(part.stem, file.name)
            if target.has(path, file.size):
                counted.advance(file.size)
                continue
            record = write_weights(folder_of(target.url, part.stem), file, part.tensors, counted.advance)
            target.add(replace(record, path=path))
    finally:
        progress.done()
    for name, data in sorted(small.items()):
        storage.write_bytes(storage.join(target.url, name), data)
        target.records[name] = record_bytes(name, data)
    return [target.records[name] for name in sorted(target.records)]


def read_back(to: str, manifest: Manifest) -> None:
    """Every size, and a sample of the content. Raises InfrastructureError for what is not as it was written."""
    problems: Sequence[str] = size_problems(to, manifest.files) or list(sample_problems(to, manifest, seed=to))
    if problems:
        raise InfrastructureError(f"{to} does not read back as it was written: {'; '.join(problems)}")


def _read_note(url: str, kind: Kind) -> dict[str, Any]:
    place = storage.join(url, kind.note)
    try:
        note: dict[str, Any] = json.loads(storage.read_bytes(place))
        if note["format"] != 1:
            raise ValueError(f"format {note['format']}")
        return {"identity": note["identity"], "planned": list(note["planned"]), "files": dict(note["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--to {url}: {place} cannot be read ({error!r}); name another place") from error


def _record(name: str, raw: Mapping[str, Any]) -> FileRecord:
    return FileRecord(name, raw["size"], tuple(Span(*span) for span in raw["spans"]))


def _clear(url: str, names: Sequence[str]) -> None:
    """The manifest first: from then on it is no finished export."""
    for name in (MANIFEST_NAME, *names):
        storage.delete_tree(storage.join(url, name))
