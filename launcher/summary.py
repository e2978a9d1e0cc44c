"""What is said at the end of a run: where the model lies, what it learned, and what to do with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..distributed import storage
from . import units
from .bottleneck import data_bottleneck
from .record import Record, before_and_after
from .report import change

USE_LOCAL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")"""


@dataclass(frozen=True)
class Summary:
    """`checkpoint` is the URL of the newest one (empty: none), `losses` name -> (before, after), `run` what the user
    calls the run, `rejected` rows of the `rows` read by the reason why nothing was learned from them, `bottleneck` what
    is said when data held the run up."""

    run: str
    checkpoint: str
    step: int
    losses: dict[str, tuple[float, float]]
    tokens: int
    step_time_s: float
    report: str
    rows: int
    rejected: dict[str, int]
    bottleneck: str | None


def summarise(record: Record, *, run: str, checkpoint: str, report: str) -> Summary:
    """The summary of a record."""
    return Summary(
        run=run,
        checkpoint=checkpoint,
        step=int(record.steps[-1]["step"]) if record.steps else 0,
        losses=before_and_after(record),
        tokens=record.tokens,
        step_time_s=record.step_time_s,
        report=report,
        rows=sum(counts.rows for counts in record.data.values()),
        rejected=dict(sum((Counter(counts.rejected) for counts in record.data.values()), Counter())),
        bottleneck=data_bottleneck(record),
    )


def render_summary(summary: Summary) -> RenderableType:
    """The summary for a terminal."""
    parts: list[RenderableType] = [_figures(summary)]
    if summary.losses:
        parts += [Text(), _losses(summary)]
    if summary.checkpoint:
        parts += [Text(), _next_commands(summary)]
    return Group(*parts)


def show_summary(summary: Summary, console: Console) -> None:
    """Print it; long paths are not wrapped, so that they can be copied."""
    console.print(render_summary(summary), soft_wrap=True, highlight=False)


def _figures(summary: Summary) -> Text:
    speed = f", {units.count(summary.tokens / summary.step_time_s)} tokens/s" if summary.step_time_s else ""
    lines = [
        ("trained   ", f"{summary.step} steps, {units.count(summary.tokens)} tokens, {_time(summary)}{speed}"),
        ("checkpoint", summary.checkpoint or "none was saved"),
        ("report    ", summary.report),
    ]
    said = [Text(f"{label}  ", style="dim") + Text(value) for label, value in lines]
    if summary.bottleneck:
        said.append(Text("slow        ", style="dim").append(summary.bottleneck, style="yellow"))
    return Text("\n").join([*said, *([_left_out(summary)] if summary.rejected else [])])


def _left_out(summary: Summary) -> Text:
    total = sum(summary.rejected.values())
    most = sorted(summary.rejected.items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{units.count(number)} {reason}" for reason, number in most)
    share = f"{total / summary.rows:.1%} of {units.count(summary.rows)} rows read"
    return Text("left out    ", style="dim").append(f"{share}: {reasons}", style="yellow")


def _time(summary: Summary) -> str:
    return f"{units.duration(summary.step_time_s)} in steps"


def _losses(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("held-out loss")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for name, (before, after) in summary.losses.items():
        table.add_row(Text(name), f"{before:.4f}", f"{after:.4f}", change(before, after))
    return table


def _next_commands(summary: Summary) -> Text:
    lines = [f'ftlaunch generate {summary.run} "your prompt"']
    if storage.is_local(summary.checkpoint):
        lines += USE_LOCAL.format(place=summary.checkpoint).splitlines()
    else:
        lines += [f"ftlaunch pull {summary.run} DIR", *USE_LOCAL.format(place="DIR").splitlines()]
    return Text("\n").join([Text("next", style="dim"), *(Text(f"  {line}") for line in lines)])
