"""Save a checkpoint: its parts, its small files, its manifest; read a sample of it back; commit it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

from ...recipes.errors import FtlaunchError, InfrastructureError, Superseded
from .. import storage
from .commit import CommitRecord, commit, commit_url, directory_name, directory_problem, read_commit
from .content import Content
from .dealing import Dealer, by_block, by_file, by_holder
from .in_place import save_in_place
from .layout import MAX_FILE_BYTES
from .manifest import MANIFEST_NAME, STATE_PATH, TRAINING, FileRecord, Manifest, record_bytes
from .parts import Part, PartPlan, plan_part
from .peers import Peers
from .streams import save_streamed
from .unchanged import Unchanged
from .uploads import save_uploaded
from .verify import SAMPLE_BYTES, sample_problems, size_problems

ROOT_STEMS = frozenset({"model", "adapter_model"})
"""Parts that `from_pretrained` reads; all others lie in training/."""


def folder_of(directory: str, stem: str) -> str:
    """The folder of a part within a checkpoint's directory."""
    return directory if stem in ROOT_STEMS else storage.join(directory, "training")


def path_of(stem: str, name: str) -> str:
    """The path of a part's file within a checkpoint's directory."""
    return name if stem in ROOT_STEMS else TRAINING + name


class _Way(NamedTuple):
    """How files are written: which rank writes what, and by what means."""

    deal: Dealer
    save: Callable[[Sequence[Part], Peers], dict[str, list[FileRecord]]]


@dataclass
class CheckpointWriter:
    """Saves the checkpoints of one attempt of a run. Every method is collective over `peers`.

    `announce(kind, **fields)` is called on rank 0 only. What ranks hold is asked for once and kept for later saves,
    so a part must keep its tensors and ranges from save to save.
    """

    run_url: str
    attempt: int
    announce: Callable[..., None]
    peers: Peers = field(default_factory=Peers)
    max_file_bytes: int = MAX_FILE_BYTES
    sample_bytes: int = SAMPLE_BYTES
    in_place: bool = False
    """All ranks share a local folder on one host, see `shared.share_local_folder`."""
    fence: Callable[[], None] = lambda: None
    """Raises Superseded where a newer attempt goes on with the run; asked on rank 0, before anything of the run is
    changed that is not this attempt's alone."""
    _plans: dict[str, PartPlan] = field(default_factory=dict)
    _load: list[int] = field(default_factory=list)
    _unchanged: Unchanged = field(default_factory=Unchanged)
    _chosen: _Way | None = None

    def plan(self, content: Content) -> Mapping[str, PartPlan]:
        """What each part looks like, found out once. `save` does it where it was not done; a copy of the content needs
        it before."""
        deal = self._way().deal
        self._load = self._load or [0] * self.peers.size
        for stem, source in content.parts.items():
            if stem not in self._plans:
                self._plans[stem] = plan_part(
                    source,
                    stem,
                    self.peers,
                    max_file_bytes=self.max_file_bytes,
                    frozen=content.frozen,
                    deal=deal,
                    load=self._load,
                )
        return self._plans

    def _way(self) -> _Way:
        """By what the place can do; found out once."""
        if self._chosen is None:
            with self.peers.together("opening the store"):
                if self.in_place:
                    self._chosen = _Way(by_holder, save_in_place)
                elif storage.takes_parts(self.run_url):
                    uploads = storage.PartUploads(self.run_url)
                    self._chosen = _Way(by_block, partial(save_uploaded, uploads=uploads))
                else:
                    self._chosen = _Way(by_file, save_streamed)
        assert self._chosen is not None
        return self._chosen

    def save(self, step: int, content: Content) -> CommitRecord:
        """Write, verify and commit the checkpoint of `step`; returns the record that counts.

        A step that is committed already stays as it is. Every rank raises if one fails, and then nothing is
        committed: UserError or InfrastructureError, or on the failing rank what went wrong there; Superseded on all of
        them where a newer attempt goes on with the run.
        """
        existing = self._begin(step)
        if existing is not None:
            return existing
        self.plan(content)
        directory = storage.join(self.run_url, directory_name(step, self.attempt))
        try:
            manifest = self._write(directory, step, content)
        except Exception:
            self._discard(directory)  # where the disk was full there is room again
            raise
        # From here on the record may be there, whatever comes back: a rank that is lost while it is made must not make
        # the others take away what it names.
        try:
            counts = self._commit(step, content, manifest)
        except Superseded:
            self._discard(directory)  # the record was not made
            raise
        if counts.attempt != self.attempt:
            self._discard(directory)
        else:
            self._remember_unchanged(directory, manifest)
        return counts

    def _write(self, directory: str, step: int, content: Content) -> Manifest:
        linked = self._link_unchanged(directory)
        records = self._save_parts(directory, content, linked)
        records += self._save_small_files(directory, content)
        records += linked.values() if self.peers.rank == 0 else ()
        everyone = self.peers.gather(records)
        files = sorted((record for ranks in everyone for record in ranks), key=lambda record: record.path)
        manifest = Manifest(step, self.attempt, tuple(files))
        self._save_manifest(directory, manifest)
        self._verify(directory, manifest)
        return manifest

    def _remember_unchanged(self, directory: str, manifest: Manifest) -> None:
        frozen = [path_of(stem, name) for stem, plan in self._plans.items() for name in plan.frozen_files()]
        self._unchanged = Unchanged(directory, {f.path: f for f in manifest.files if f.path in frozen})

    def _link_unchanged(self, directory: str) -> dict[str, FileRecord]:
        """What never changes comes from this attempt's last checkpoint; what cannot is written again."""
        linked: dict[str, FileRecord] = {}
        with self.peers.together("linking what never changes"):
            if self.peers.rank == 0:
                linked = self._unchanged.link_into(directory)
        return self.peers.broadcast(linked)  # type: ignore[no-any-return]

    def _discard(self, directory: str) -> None:
        """What never was a checkpoint, and will not become one."""
        if self.peers.rank == 0:
            with suppress(FtlaunchError):  # left to a later attempt, which deletes what no record names
                storage.delete_tree(directory)

    def _begin(self, step: int) -> CommitRecord | None:
        """An existing commit of the step; else what an earlier try of this very attempt left is cleared away.

        A commit whose directory is damaged makes room for ours: it was passed over when the run was resumed.
        """
        existing: CommitRecord | None = None
        with self.peers.together("looking for earlier commits"):
            if self.peers.rank == 0:
                self.fence()
                existing = self._usable_commit(step)
                if existing is None:
                    storage.delete_tree(storage.join(self.run_url, directory_name(step, self.attempt)))
        existing = self.peers.broadcast(existing)
        if existing is not None and self.peers.rank == 0:
            self.announce("checkpoint_kept", step=step, directory=existing.directory, attempt_kept=existing.attempt)
        return existing

    def _usable_commit(self, step: int) -> CommitRecord | None:
        existing = read_commit(self.run_url, step)
        problem = existing and directory_problem(self.run_url, existing)
        if existing is None or problem is None:
            return existing
        storage.delete_tree(commit_url(self.run_url, step))
        self.announce("checkpoint_replaced", step=step, directory=existing.directory, problem=problem)
        return None

    def _save_parts(self, directory: str, content: Content, linked: Collection[str]) -> list[FileRecord]:
        parts = [
            Part(source, folder_of(directory, stem), self._plan_now(stem, content, linked))
            for stem, source in content.parts.items()
        ]
        records = self._way().save(parts, self.peers)
        return [replace(one, path=path_of(stem, one.path)) for stem, ones in records.items() for one in ones]

    def _plan_now(self, stem: str, content: Content, linked: Collection[str]) -> PartPlan:
        plan = self._plans[stem].of_copies() if content.copied else self._plans[stem]
        return replace(plan, linked=frozenset(f.name for f in plan.files.files if path_of(stem, f.name) in linked))

    def _save_small_files(self, directory: str, content: Content) -> list[FileRecord]:
        """Indexes, state and extra files, from rank 0."""
        records = []
        with self.peers.together("writing the small files"):
            if self.peers.rank == 0:
                small = dict(content.extra_files)
                small[STATE_PATH] = json.dumps(content.state, ensure_ascii=False).encode() + b"\n"
                for stem in content.parts:
                    files = self._plans[stem].files
                    if (index := files.index()) is not None:
                        small[path_of(stem, files.index_name)] = index
                for path, data in small.items():
                    storage.write_bytes(storage.join(directory, path), data)
                    records.append(record_bytes(path, data))
        return records

    def _save_manifest(self, directory: str, manifest: Manifest) -> None:
        with self.peers.together("writing the manifest"):
            if self.peers.rank == 0:
                url = storage.join(directory, MANIFEST_NAME)
                storage.write_bytes(url, manifest.to_bytes())
                if storage.read_bytes(url) != manifest.to_bytes():
                    raise InfrastructureError(f"{url} does not read back as it was written")

    def _verify(self, directory: str, manifest: Manifest) -> None:
        """Ranks look at different files' sizes and at different samples of the spans."""
        with self.peers.together("reading the checkpoint back"):
            problems = size_problems(directory, manifest.files[self.peers.rank :: self.peers.size])
            seed = f"{directory} {self.peers.rank}"
            problems += sample_problems(directory, manifest, seed=seed, max_bytes=self.sample_bytes)
            if problems:
                raise InfrastructureError("the checkpoint does not read back as written: " + "; ".join(problems))

    def _commit(self, step: int, content: Content, manifest: Manifest) -> CommitRecord:
        created_at = datetime.now(UTC).isoformat(timespec="seconds")
        name = directory_name(step, self.attempt)
        ours = CommitRecord(step, self.attempt, name, created_at, dict(content.metrics))
        counts = ours
        with self.peers.together("committing"):
            if self.peers.rank == 0:
                self.fence()  # ranks may have slept since the save began
                counts = commit(self.run_url, ours)
                self._announce_commit(ours, counts, manifest)
        return self.peers.broadcast(counts)  # type: ignore[no-any-return]

    def _announce_commit(self, ours: CommitRecord, counts: CommitRecord, manifest: Manifest) -> None:
        if counts.directory == ours.directory:
            size = sum(file.size for file in manifest.files)
            self.announce("checkpoint_committed", step=ours.step, directory=ours.directory, bytes=size)
        else:
            kept = {"directory": counts.directory, "attempt_kept": counts.attempt}
            self.announce("checkpoint_kept", step=ours.step, **kept)
