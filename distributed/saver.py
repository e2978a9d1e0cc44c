"""When the loop says save: what belongs into a checkpoint, in one place; and what may go afterwards."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ..recipes.errors import FtlaunchError, Superseded, UserError
from ..recipes.naming import best_metric
from ..recipes.schema import Recipe
from .background import Work
from .checkpoint.commit import add_metrics
from .checkpoint.content import Content
from .checkpoint.fetch import Share
from .checkpoint.fragments import Fragment
from .checkpoint.manifest import STATE_PATH, DamagedError, FileRecord, read_checked, read_manifest
from .checkpoint.parts import Source
from .checkpoint.peers import LostRank
from .checkpoint.reader import CheckpointReader, Memory
from .checkpoint.retention import Retention, apply_retention, drop_unfinished_uploads
from .checkpoint.save import CheckpointWriter, folder_of, path_of
from .checkpoint.staging import Staging
from .data import counters
from .data.stream import Stream
from .evaluate import Evaluator
from .group import Group
from .metrics import Recorder, Stopwatch
from .rejections import Rejections
from .run_directory import RunDirectory
from .schedule import Extent
from .stored_layout import AS_IT_IS, StoredLayout
from .strategies.base import Engine
from .weights import check_stored


class _Pending(NamedTuple):
    """A save that goes on in the background."""

    step: int
    work: Work


@dataclass
class Saver:
    """Saves checkpoints of one attempt. Every method is collective."""

    recipe: Recipe
    run: RunDirectory
    group: Group
    engine: Engine
    stream: Stream
    evaluator: Evaluator
    writer: CheckpointWriter
    recorder: Recorder | None
    extra_files: Mapping[str, bytes]
    """config.json, tokenizer and so on; only rank 0 needs them."""
    parts: Mapping[str, Source]
    """What the engine holds, by file stem; see `parts_of`."""
    frozen: Collection[str]
    """Names in files of tensors that are not trained."""
    data_digest: str
    staging: Staging | None = None
    """Where checkpoints are copied to and written from while training goes on; None: training waits for each."""
    last_step: int | None = None
    rejections: Rejections = field(default_factory=Rejections)
    _pending: _Pending | None = None
    _since_save: Stopwatch = field(default_factory=Stopwatch)
    _is_first_room: bool = True

    def save(self, extent: Extent, *, last: bool = False) -> None:
        """Write, verify and commit a checkpoint of the weights as they are; a step that is saved stays as it is, but
        for losses that were measured since. With a `staging` only the copy is waited for. The `last` checkpoint of a
        run is always waited for, and its failure always raised."""
        self._since_save = watch = Stopwatch()
        self.settle()
        if extent.steps == self.last_step:
            self.group.from_main(partial(self._add_losses, extent.steps), "adding losses to the last checkpoint")
        elif self.staging is None or last:
            self._save_now(extent, watch, must=last)
        else:
            content = self._gathered(extent)
            plans = self.writer.plan(content)
            copied = self.group.alike(partial(self.staging.copy, content, plans), "copying what is saved")
            write = partial(self._write, extent.steps, copied, watch, watch.elapsed())
            self._pending = _Pending(extent.steps, Work(write, "checkpoint"))

    def _save_now(self, extent: Extent, watch: Stopwatch, *, must: bool) -> None:
        if self.recorder:
            self.recorder.phase("saving")
        content = self._gathered(extent)
        with self._ending(extent.steps, must=must):
            self._write(extent.steps, content, watch)
        if self.recorder:
            self.recorder.phase("training")

    def _write(self, step: int, content: Content, watch: Stopwatch, stall_s: float | None = None) -> None:
        """Talks to other ranks over the writer's own peers, and touches nothing that training changes."""
        commit = self.writer.save(step, content)
        if self.recorder:
            seconds = watch.elapsed()
            self.recorder.checkpoint(step, self.run.path(commit.directory), seconds, stall_s or seconds)
            self._make_room(self.recorder)

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the save in the background has failed; `settle` says how."""
        return self._pending is not None and self._pending.work.has_failed

    def settle(self) -> None:
        """Wait for the save in the background, if there is one. Raises on every rank if it has failed, unless the
        recipe has training go on."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with self._ending(pending.step, must=False):
                pending.work.wait()

    @contextmanager
    def _ending(self, step: int, *, must: bool) -> Iterator[None]:
        try:
            with self.group.peers.together(f"saving step {step}"), self._superseded_first():
                yield
        except Exception as error:
            if must or self.recipe.checkpoint.on_error == "stop" or isinstance(error, Superseded):
                raise
            if self.recorder:
                kept = "none" if self.last_step is None else f"that of step {self.last_step}"
                text = f"step {step} was not saved: {error}. Training goes on; the newest checkpoint is {kept}"
                self.recorder.message(text, level="warning")
            self._meet_again(error)
        else:
            self.last_step = step

    def _meet_again(self, error: Exception) -> None:
        """A connection that broke stays so: ranks that lost each other in a save need another one for the next."""
        if any(self.group.peers.gather(isinstance(error, LostRank))):
            self.writer.peers = self.group.for_saves()

    @contextmanager
    def _superseded_first(self) -> Iterator[None]:
        """A newer attempt clears away what this one was writing, which then fails; that is no failure of storage."""
        try:
            yield
        except Exception as error:
            if self.group.world.is_main:
                self._check_newest(error)
            raise

    def _check_newest(self, error: Exception) -> None:
        """Raises Superseded where that is why a save failed."""
        try:
            self.run.check_newest(self.writer.attempt)
        except Superseded as reason:
            raise reason from error
        except FtlaunchError:  # storage does not answer: what failed first is what counts
            return

    def close(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the save in the background end, also where training fails on this rank alone; only who has no time, by
        an exit or a second signal, does not wait."""
        if self._pending is None or (kind is not None and not issubclass(kind, Exception)):
            return
        with suppress(Exception):  # what ended the training is what counts; the save's own failure has been recorded
            self._pending.work.wait()

    def _gathered(self, extent: Extent) -> Content:
        """What is saved. Collective, over the group of the training."""
        state = self._state(extent)
        if self.recorder:
            counts = counters.total(stream["counters"] for stream in state["stream"].values())
            self.recorder.data(extent.steps, counts, self.data_digest)
            # Before the commit: a resumed run takes no step again that is committed, so its numbers would be lost.
            self.recorder.metrics.flush()
        refused = self.rejections.take(self.group.peers)
        if self.recorder and refused:
            self.recorder.events.record("rejected_rows", rows=refused)
        return self._content(state)

    def _add_losses(self, step: int) -> None:
        self.run.check_newest(self.writer.attempt)
        if self.recorder and self.evaluator.last_step == step:
            add_metrics(self.run.url, step, self.evaluator.last)
            self._make_room(self.recorder)

    def _state(self, extent: Extent) -> dict[str, Any]:
        streams: dict[str, Any] = {}
        for part in self.group.peers.gather(self.stream.state()):
            streams.update(part)
        return {
            "format": 1,
            "extent": asdict(extent),
            "data": self.data_digest,
            "stream": streams,
            "optimizer": dict(self.engine.optimizer_state()),
            "evaluator": self.evaluator.state(),
        }

    def _content(self, state: Mapping[str, Any]) -> Content:
        return Content(
            parts=self.parts,
            extra_files=self.extra_files,
            state=state,
            frozen=self.frozen,
            metrics=self.evaluator.last if self.evaluator.last_step == state["extent"]["steps"] else {},
        )

    def is_late(self) -> bool:
        """Whether `every_minutes` have passed since the last save began, by this rank's clock."""
        minutes = self.recipe.checkpoint.every_minutes
        return minutes is not None and self._since_save.elapsed() >= 60 * minutes

    def _make_room(self, recorder: Recorder) -> None:
        self.run.check_newest(self.writer.attempt)
        who: Any = {
            "attempt": self.writer.attempt,
            "alive": [attempt.number for attempt in self.run.live_attempts()],
            "report": partial(recorder.message, level="warning"),
        }
        apply_retention(self.run.url, retention_of(self.recipe), **who)
        if self._is_first_room:  # by now attempts that were killed before this one no longer look alive
            self._is_first_room = False
            drop_unfinished_uploads(self.run.url, **who)


def retention_of(recipe: Recipe) -> Retention:
    """What the recipe keeps."""
    keep, metric = recipe.checkpoint, best_metric(recipe)
    best = keep.keep_best if keep.keep_best is not None else int(recipe.evaluate.early_stopping is not None)
    return Retention(keep.keep_last, keep.keep_every, best, metric, keep.keep_training_state)


def parts_of(engine: Engine, *, has_adapter: bool, layout: StoredLayout = AS_IT_IS) -> dict[str, Source]:
    """What an engine holds, as files have it, by file stem."""
    return {stem_of(part, has_adapter): partial(_stored, engine, part, layout) for part in engine.parts}


def _stored(engine: Engine, part: str, layout: StoredLayout) -> Iterator[Fragment]:
    return layout.cut(engine.fragments(part))


def stem_of(part: str, has_adapter: bool) -> str:
    """The file stem of a part: peft calls its own file differently."""
    return "adapter_model" if part == "model" and has_adapter else part


def read_state(directory: str) -> dict[str, Any]:
    """The state beside a checkpoint's tensors."""
    record = next(file for file in read_manifest(directory).files if file.path == STATE_PATH)
    state: dict[str, Any] = json.loads(bytes(read_checked(directory, STATE_PATH, record.spans, 0, record.size)))
    return state


def load_parts(
    engine: Engine, directory: str, has_adapter: bool, share: Share | None = None, layout: StoredLayout = AS_IT_IS
) -> None:
    """Fill an engine with a checkpoint: weights, masters, optimizer; each rank reads just its ranges, and holds them
    against the manifest's checksums. Raises DamagedError for bytes that are not what was written, and UserError for a
    checkpoint of another model, adapter or optimizer."""
    files = read_manifest(directory).files
    stems = {part: stem_of(part, has_adapter) for part in engine.parts}
    refuse_missing(directory, stems.values(), files)
    memory = Memory()
    readers = {part: checked_reader(directory, stem, files, share, memory) for part, stem in stems.items()}
    joined = {part: layout.joined(reader) for part, reader in readers.items()}
    check_stored(directory, {one.spec.name: one.spec.shape for one in engine.fragments("model")}, joined["model"])
    for part, reader in joined.items():
        engine.load(part, reader)
    if damaged := [problem for reader in readers.values() for problem in reader.damaged]:
        raise DamagedError(damaged[0])
    engine.load_optimizer_state(read_state(directory)["optimizer"])


def checked_reader(
    directory: str, stem: str, files: Sequence[FileRecord], share: Share | None = None, memory: Memory | None = None
) -> CheckpointReader:
    """A part of a checkpoint, held against the manifest's checksums as it is read."""
    prefix = path_of(stem, "")
    spans = {file.path.removeprefix(prefix): file.spans for file in files if file.path.startswith(prefix)}
    return CheckpointReader(folder_of(directory, stem), stem, spans, share, memory)


def refuse_missing(directory: str, stems: Iterable[str], files: Sequence[FileRecord]) -> None:
    """Where --accept-changes let another optimizer in."""
    paths = [file.path for file in files]
    starts = {stem: (path_of(stem, f"{stem}."), path_of(stem, f"{stem}-")) for stem in stems}
    missing = [stem for stem, start in starts.items() if not any(path.startswith(start) for path in paths)]
    if missing:
        held = ", ".join(path for path in paths if path.endswith(".safetensors"))
        raise UserError(
            f"{directory} has no {', '.join(missing)}, from which train.optimizer goes on; it holds {held}. If another "
            f"optimizer wrote it, set train.optimizer back, or begin a new run with model.path: {directory}."
        )
