"""Held-out loss per named set, and when to stop because it no longer falls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..recipes.errors import UserError
from ..recipes.methods.base import Method, Models
from ..recipes.schema import EarlyStopping
from .batch import empty_batch, on_device
from .data.parts import MicroBatch
from .group import Group
from .memory import within_memory
from .metrics import Recorder, Stopwatch
from .strategies.base import Engine

Reader = Callable[[], Iterator[MicroBatch]]
"""Opens one eval set anew: this rank's share of its rows, in file order."""


@dataclass
class Evaluator:
    """Measures every eval set and remembers the best."""

    group: Group
    method: Method
    models: Models
    engine: Engine
    sets: Mapping[str, Reader]
    early_stopping: EarlyStopping | None
    recorder: Recorder | None
    advise: Callable[[], str]
    """What to say when memory does not suffice."""
    last: dict[str, float] = field(default_factory=dict)
    last_step: int = -1
    best: float | None = None
    without_improvement: int = 0
    _new_best: bool = False

    def measure(self, step: int) -> dict[str, float]:
        """Losses by "NAME/loss"; the same on every rank. A step that was just measured is not measured again."""
        if step == self.last_step or not self.sets:
            return self.last
        watch = Stopwatch()
        if self.recorder:
            self.recorder.phase("evaluating")
        self.last = {f"{name}/loss": self._loss(name, reader) for name, reader in self.sets.items()}
        self.last_step = step
        self._compare_with_best()
        if self.recorder:
            self.recorder.evaluation(step, self.last, watch.elapsed())
            self.recorder.phase("training")
        return self.last

    def _loss(self, name: str, reader: Reader) -> float:
        """One sum divided by one weight over all ranks. Ranks that run out of rows go on with padding, because a
        sharded forward needs everybody."""
        self.engine.module.eval()
        batches, loss_sum, weight = reader(), 0.0, 0.0
        while True:
            micro, [readers] = self.group.act_and_sum(partial(_next, batches), 1, f"reading eval set {name!r}")
            if not readers:
                break
            batch = micro.batch if micro else empty_batch()
            with torch.no_grad(), within_memory(self.group.world, f"evaluating {name!r}", self.advise):
                terms = self.method.loss(self.models, on_device(batch, self.group.world.device))
            loss_sum += float(terms.loss_sum)
            weight += self.method.weight(batch)
        loss_sum, weight = self.group.sum([loss_sum, weight])
        if not weight:
            raise UserError(f"data.eval: no row of {name!r} has anything to predict.")
        return loss_sum / weight

    def _compare_with_best(self) -> None:
        if self.early_stopping is None:
            return
        value = self.last[self.early_stopping.metric]
        self._new_best = self.best is None or value < self.best - self.early_stopping.min_delta
        self.without_improvement = 0 if self._new_best else self.without_improvement + 1
        self.best = value if self._new_best else self.best

    def should_stop_early(self) -> bool:
        """Whether patience has run out."""
        return self.early_stopping is not None and self.without_improvement >= self.early_stopping.patience

    def has_new_best(self) -> bool:
        """Whether the last measurement was the best so far; true once per measurement."""
        new, self._new_best = self._new_best, False
        return new

    def state(self) -> dict[str, Any]:
        """What a resumed run must remember."""
        return {
            "best": self.best,
            "without_improvement": self.without_improvement,
            "last": self.last,
            "last_step": self.last_step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.best, self.without_improvement = state["best"], state["without_improvement"]
        self.last, self.last_step = dict(state["last"]), state["last_step"]


def _next(batches: Iterator[MicroBatch]) -> tuple[MicroBatch | None, list[float]]:
    micro = next(batches, None)
    return micro, [micro is not None]
