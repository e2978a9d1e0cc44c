"""What a run says about itself: metrics.jsonl, events.jsonl, TensorBoard, W&B, and the monitor. Rank 0 only."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..recipes.errors import UserError
from ..recipes.load import LoadedRecipe
from ..recipes.redact import redact
from ..recipes.schema import Recipe, Wandb
from . import storage
from .attempt import Attempt
from .data import counters
from .monitor import Monitor
from .pulse import Pulse
from .run_directory import EventLog, RunDirectory


class Tracker(Protocol):
    """Somewhere else that numbers go."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard event files in the run directory (local runs; elsewhere they would have to be rewritten whole)."""

    def __init__(self, directory: str) -> None:
        from torch.utils.tensorboard import FileWriter

        self._writer = FileWriter(directory)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all: with one each, as SummaryWriter does it, the writer's queue of ten is full at every step.
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_summary(Summary(value=scalars), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, continued by the next attempt of the same run."""

    def __init__(self, settings: Wandb, name: str, run_url: str) -> None:
        """Raises UserError where the package is missing or W&B refuses."""
        try:
            import wandb
        except ImportError as error:
            raise UserError("track.wandb: the package is not installed: pip install 'ftlaunch[wandb]'") from error
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=name,
                id=hashlib.blake2b(run_url.encode(), digest_size=8).hexdigest(),
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(
                f"track.wandb: {error}. Set WANDB_API_KEY, or WANDB_MODE=offline where W&B cannot be reached, or leave "
                "track.wandb out."
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


@dataclass
class Recorder:
    """Writes what happens down, and passes it on to whoever watches."""

    run: RunDirectory
    attempt: int
    monitor: Monitor
    events: EventLog
    metrics: storage.LineLog
    trackers: tuple[Tracker, ...]
    pulse: Pulse
    secrets: tuple[str, ...] = ()

    @classmethod
    def open(cls, loaded: LoadedRecipe, attempt: Attempt, monitor: Monitor) -> Recorder:
        """The recorder of an attempt, with the trackers that `track:` asks for."""
        run = attempt.run
        events = run.open_events(attempt.number, loaded.secrets)
        trackers = open_trackers(loaded.recipe, run.url)
        pulse = Pulse(run, attempt.number)
        metrics = run.open_metrics(attempt.number)
        recorder = cls(run, attempt.number, monitor, events, metrics, trackers, pulse, loaded.secrets)
        for note in attempt.notes:
            recorder.message(note, level="warning")
        return recorder

    def phase(self, name: str) -> None:
        """A part of the run begins."""
        self.monitor.emit({"kind": "phase", "phase": name})
        self.events.record("phase", phase=name)

    def message(self, text: str, level: str = "info") -> None:
        """Something the user should read."""
        self.monitor.emit({"kind": "message", "text": redact(text, self.secrets), "level": level})
        self.events.record("message", text=text, level=level)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """An optimizer step was taken."""
        self.metrics.append({"kind": "step", "step": step, "attempt": self.attempt, "time": _now(), **values})
        self.monitor.emit({"kind": "step", "step": step, **values})
        self._track(step, {f"train/{name}": value for name, value in values.items()})
        self.pulse.step = step

    def evaluation(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Held-out losses were measured, in so many seconds."""
        measured = {"losses": dict(losses), "seconds": seconds}
        self.metrics.append({"kind": "evaluation", "step": step, "attempt": self.attempt, **measured})
        self.monitor.emit({"kind": "evaluation", "step": step, "losses": dict(losses)})
        self._track(step, {f"eval/{name}": value for name, value in losses.items()})

    def data(self, step: int, counts: counters.Counts, digest: str) -> None:
        """Counts per source so far; `digest` tells which files they are of, and in which order they are read."""
        sources = {source: _nested(numbers) for source, numbers in counts.items()}
        about = {"sources": sources, "digest": digest}
        self.metrics.append({"kind": "data", "step": step, "attempt": self.attempt, **about})

    def checkpoint(self, step: int, path: str, seconds: float, stall_s: float) -> None:
        """A checkpoint was committed, after `seconds`; training was held up for `stall_s` of them. From any thread."""
        times = {"seconds": seconds, "save_stall_s": stall_s}
        self.monitor.emit({"kind": "checkpoint", "step": step, "path": path, **times})
        self.events.record("checkpoint", step=step, path=path, **times)
        self.metrics.append({"kind": "checkpoint", "step": step, "attempt": self.attempt, **times})

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Bring everything to storage."""
        self.pulse.close()
        self.metrics.close()
        self.events.close()
        for tracker in self.trackers:
            tracker.close()


def open_trackers(recipe: Recipe, run_url: str) -> tuple[Tracker, ...]:
    """What `track:` asks for."""
    trackers: list[Tracker] = []
    if recipe.track.tensorboard and storage.is_local(run_url):
        trackers.append(TensorBoard(storage.join(run_url, "tensorboard")))
    if recipe.track.wandb is not None:
        trackers.append(WeightsAndBiases(recipe.track.wandb, recipe.name, run_url))
    return tuple(trackers)


def _nested(numbers: Mapping[str, int]) -> dict[str, Any]:
    """{"rejected/REASON": n} as {"rejected": {REASON: n}}."""
    nested: dict[str, Any] = {"rejected": {}}
    for name, number in numbers.items():
        kind, slash, reason = name.partition("/")
        if slash:
            nested[kind][reason] = number
        else:
            nested[kind] = number
    return nested


def _now() -> float:
    """Seconds since 1970, to the millisecond: of a run that is killed, when it last did something."""
    return round(time.time(), 3)


class Stopwatch:
    """Seconds since it was made, or since the last lap began."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self._last

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
