"""When the loop says save: what belongs into a checkpoint, in one place; and what may go afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ..recipes.schema import Recipe
from . import storage
from .checkpoint.commit import add_metrics
from .checkpoint.reader import CheckpointReader
from .checkpoint.retention import apply_retention
from .checkpoint.save import STATE_PATH, CheckpointWriter, Content, folder_of
from .data import counters
from .data.stream import Stream
from .evaluate import Evaluator
from .group import Group
from .metrics import Recorder, Stopwatch
from .rejections import Rejections
from .run_directory import RunDirectory
from .schedule import Extent
from .strategies.base import Engine


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
    has_adapter: bool
    data_digest: str
    last_step: int | None = None
    rejections: Rejections = field(default_factory=Rejections)

    def save(self, extent: Extent) -> None:
        """Write, verify and commit a checkpoint of the weights as they are; a step that is saved stays as it is, but
        for losses that were measured since."""
        if extent.steps == self.last_step:
            self.group.from_main(partial(self._add_losses, extent.steps), "adding losses to the last checkpoint")
            return
        watch = Stopwatch()
        if self.recorder:
            self.recorder.phase("saving")
        state = self._state(extent)
        if self.recorder:
            self.recorder.data(extent.steps, counters.total(stream["counters"] for stream in state["stream"].values()))
            # Before the commit: a resumed run takes no step again that is committed, so its numbers would be lost.
            self.run.metrics.flush()
        commit = self.writer.save(extent.steps, self._content(state))
        self.last_step = extent.steps
        refused = self.rejections.take(self.group.peers)
        if self.recorder:
            if refused:
                self.recorder.events.record("rejected_rows", rows=refused)
            self.recorder.checkpoint(extent.steps, self.run.path(commit.directory), watch.lap())
            self._make_room(self.recorder)
            self.recorder.phase("training")

    def _add_losses(self, step: int) -> None:
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
            parts={stem_of(part, self.has_adapter): partial(self.engine.fragments, part) for part in self.engine.parts},
            extra_files=self.extra_files,
            state=state,
            metrics=self.evaluator.last if self.evaluator.last_step == state["extent"]["steps"] else {},
        )

    def _make_room(self, recorder: Recorder) -> None:
        early = self.recipe.evaluate.early_stopping
        apply_retention(
            self.run.url,
            keep_last=self.recipe.checkpoint.keep_last,
            metric=early.metric if early else None,
            attempt=self.writer.attempt,
            alive=[attempt.number for attempt in self.run.live_attempts()],
            report=partial(recorder.message, level="warning"),
        )


def stem_of(part: str, has_adapter: bool) -> str:
    """The file stem of a part: peft calls its own file differently."""
    return "adapter_model" if part == "model" and has_adapter else part


def read_state(directory: str) -> dict[str, Any]:
    """The state beside a checkpoint's tensors."""
    state: dict[str, Any] = json.loads(storage.read_bytes(storage.join(directory, STATE_PATH)))
    return state


def load_parts(engine: Engine, directory: str, has_adapter: bool) -> None:
    """Fill an engine with a checkpoint: weights, masters, optimizer; each rank reads just its ranges."""
    for part in engine.parts:
        stem = stem_of(part, has_adapter)
        engine.load(part, CheckpointReader(folder_of(directory, stem), stem))
    engine.load_optimizer_state(read_state(directory)["optimizer"])
