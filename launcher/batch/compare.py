"""What became of the runs of a batch, side by side. Pure but for reading their directories."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from .. import units
from ..charts import Series, line_chart
from ..history import read_history
from ..overview.standing import standing_of
from ..page import render_template
from ..record import series
from .members import Member

MAX_LINES = 8
"""Of a chart: there are so many colours."""


@dataclass(frozen=True)
class Result:
    """One run of the batch. `losses`: the last of each eval set, by name; `points`: (step, training loss)."""

    name: str
    settings: dict[str, str]
    state: str
    run: str
    exit_code: int | None
    step: int = 0
    loss: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    step_time_s: float = 0.0
    goodput: float = 0.0
    message: str = ""
    points: list[tuple[float, float]] = field(default_factory=list)

    @property
    def score(self) -> float:
        """By what runs are ordered: the mean of the held-out losses, or the training loss where there are none."""
        if self.losses:
            return sum(self.losses.values()) / len(self.losses)
        return math.inf if self.loss is None else self.loss


def result_of(member: Member, exit_code: int | None) -> Result:
    """What a run's directory says. `exit_code`: None for a run that was not started."""
    history, standing = read_history(member.run), standing_of(member.run)
    record = history.record
    failed = exit_code not in (None, 0) and not standing.tried
    return Result(
        name=member.name,
        settings=dict(member.settings),
        state="not started" if not standing.tried and exit_code is None else "refused" if failed else standing.word,
        run=member.run.url,
        exit_code=exit_code,
        step=int(record.steps[-1]["step"]) if record.steps else 0,
        loss=float(record.steps[-1]["loss"]) if record.steps else None,
        losses=dict(record.evaluations[-1].losses) if record.evaluations else {},
        tokens=record.tokens,
        step_time_s=record.step_time_s,
        goodput=history.ledger.goodput,
        message=standing.message,
        points=series(record, "loss"),
    )


def ranked(results: Iterable[Result]) -> list[Result]:
    """The best first; runs without losses, and those whose loss is no number, last."""
    return sorted(results, key=lambda each: (not math.isfinite(each.score), each.score, each.name))


def headings(results: Sequence[Result]) -> list[str]:
    """Of the table's columns."""
    swept = dict.fromkeys(key for each in results for key in each.settings)
    losses = dict.fromkeys(name for each in results for name in each.losses)
    return ["run", *swept, "state", "steps", *losses, "train loss", "tokens", "time in steps", "goodput"]


def cells(result: Result, results: Sequence[Result]) -> list[str]:
    """A run's row below `headings`."""
    swept = dict.fromkeys(key for each in results for key in each.settings)
    losses = dict.fromkeys(name for each in results for name in each.losses)
    return [
        result.name,
        *(result.settings.get(key, "") for key in swept),
        result.state,
        str(result.step),
        *(f"{result.losses[name]:.4f}" if name in result.losses else "" for name in losses),
        "" if result.loss is None else f"{result.loss:.4f}",
        units.count(result.tokens),
        units.duration(result.step_time_s),
        f"{result.goodput:.1%}",
    ]


def terminal_table(results: Sequence[Result]) -> Table:
    """For a terminal, the best run first."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings(results):
        is_text = heading in ("run", "state")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=is_text)
    for result in ranked(results):
        table.add_row(*map(Text, cells(result, results)))
    return table


def page(results: Sequence[Result], name: str) -> str:
    """For a browser: the table and the curves of the best runs."""
    from markupsafe import Markup

    best = ranked(results)
    curves = [Series(each.name, each.points, noisy=True) for each in best[:MAX_LINES] if each.points]
    return render_template(
        "batch.html.j2",
        name=name,
        headings=headings(results),
        rows=[cells(each, results) for each in best],
        texts=2 + len(dict.fromkeys(key for each in results for key in each.settings)),
        chart=Markup(line_chart(curves, lambda y: f"{y:.4g}")),  # noqa: S704 - it escapes its own texts
        hidden=max(0, len(best) - MAX_LINES),
        failures=[(each.name, each.message) for each in best if each.message],
    )


def values(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For programs, the best run first; losses that are no numbers are null."""
    return [
        {
            "name": each.name,
            "settings": each.settings,
            "state": each.state,
            "exit_code": each.exit_code,
            "run": each.run,
            "step": each.step,
            "loss": _number(each.loss),
            "losses": {name: _number(loss) for name, loss in each.losses.items()},
            "tokens": each.tokens,
            "step_time_s": each.step_time_s,
            "goodput": each.goodput,
            "message": each.message,
        }
        for each in ranked(results)
    ]


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
