"""What a run wrote down, put in order: metrics and events as they count after every crash and resume. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Line = Mapping[str, Any]
COUNTERS = ("rows", "tokens", "supervised", "truncated", "split", "lost_tokens", "rejected")


@dataclass(frozen=True)
class Evaluation:
    """Losses of the eval sets (`NAME/loss`) after `step` optimizer steps."""

    step: int
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Counts:
    """What became of a source's rows; `rejected` by reason."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    split: int = 0
    lost_tokens: int = 0
    """Of rows longer than a sequence: those that were cut off, or dropped with the row."""
    rejected: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One run. `steps` and `evaluations` are ascending by step, each step once; `data` has the latest counters of
    each source, `data_digest` tells which files they are of, in which order ("": not written down); `attempts` counts
    how often the run was started."""

    environment: Mapping[str, Any]
    steps: tuple[Line, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    data: Mapping[str, Counts] = field(default_factory=dict)
    events: tuple[Line, ...] = ()
    attempts: int = 0
    data_digest: str = ""

    @property
    def tokens(self) -> int:
        """Tokens trained on; a step's line counts those of all steps so far."""
        return int(self.steps[-1]["tokens"]) if self.steps else 0

    @property
    def step_time_s(self) -> float:
        """Time spent in the steps that count, seconds; start-up, evaluation and saving are not in it."""
        return sum(float(line["step_s"]) for line in self.steps)


def parse_lines(text: str) -> list[Line]:
    """JSON lines; a last line that a crash cut short is left out."""
    lines: list[Line] = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def make_record(metrics: Iterable[Line], events: Iterable[Line], environment: Mapping[str, Any]) -> Record:
    """Put a run's lines in order. After a resume a step can occur twice: the later attempt counts, and what an
    earlier attempt did beyond the point of resuming is left out."""
    lines = list(metrics)
    counted, _ = split(lines)
    data_lines = sorted((line for line in lines if line["kind"] == "data"), key=_place)
    evaluations = _latest(counted, "evaluation")
    return Record(
        environment=environment,
        steps=tuple(_latest(counted, "step")),
        evaluations=tuple(Evaluation(int(line["step"]), line["losses"]) for line in evaluations),
        data={name: _counts(raw) for name, raw in data_lines[-1]["sources"].items()} if data_lines else {},
        events=tuple(events),
        attempts=max((int(line["attempt"]) for line in lines), default=0),
        data_digest=str(data_lines[-1].get("digest", "")) if data_lines else "",
    )


def _counts(raw: Mapping[str, Any]) -> Counts:
    """A source's counters; those that never counted anything are not in the line."""
    return Counts(**{name: raw[name] for name in COUNTERS if name in raw})


def _place(line: Line) -> tuple[int, int]:
    return int(line["attempt"]), int(line["step"])


def split(lines: Iterable[Line]) -> tuple[list[Line], list[Line]]:
    """Lines that count, and those that a later attempt took back by starting again before them."""
    lines = list(lines)
    begins: dict[int, int] = {}
    for line in lines:
        if line["kind"] == "step":
            attempt, step = _place(line)
            begins[attempt] = min(step, begins.get(attempt, step))

    def stands(line: Line) -> bool:
        attempt, step = _place(line)
        return all(step < begin for later, begin in begins.items() if later > attempt)

    counted = [line for line in lines if stands(line)]
    return counted, [line for line in lines if not stands(line)]


def _latest(lines: list[Line], kind: str) -> list[Line]:
    """The lines of a kind, ascending by step; of two for the same step the later attempt's."""
    by_step = {int(line["step"]): line for line in sorted(lines, key=_place) if line["kind"] == kind}
    return [by_step[step] for step in sorted(by_step)]


def before_and_after(record: Record) -> dict[str, tuple[float, float]]:
    """Eval set's loss name -> (first, last measured)."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for evaluation in record.evaluations:
        first = {**evaluation.losses, **first}
        last = {**last, **evaluation.losses}
    return {name: (first[name], last[name]) for name in sorted(first)}


def series(record: Record, key: str, transform: Callable[[Line], float] | None = None) -> list[tuple[float, float]]:
    """(step, value) points of a metric, where it was written down."""
    value = transform or (lambda line: float(line[key]))
    return [(float(line["step"]), value(line)) for line in record.steps if line.get(key) is not None]
