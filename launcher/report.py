"""report.html: one self-contained page that says how a run went and what it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import units
from .bottleneck import bytes_read, data_bottleneck
from .charts import Series, line_chart
from .goodput.bar import ledger_bar, ledger_rows
from .goodput.ledger import Ledger
from .page import render_template
from .record import Counts, Record, before_and_after, series

MAIN_PACKAGES = ("ftlaunch", "torch", "transformers", "peft", "ray", "tokenizers", "numpy")


NO_TIME = Ledger({"training": 0.0})


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the page."""

    label: str
    value: str


def render_report(record: Record, *, name: str, state: str, recipe_text: str, ledger: Ledger = NO_TIME) -> str:
    """The page for a run. `recipe_text` is shown as it is: secrets must be gone from it already."""
    from markupsafe import Markup

    # The charts escape their own texts; everything else is escaped by the template.
    charts = [(title, Markup(svg)) for title, svg in _charts(record) if svg]  # noqa: S704
    return render_template(
        "report.html.j2",
        name=name,
        state=state,
        bottleneck=data_bottleneck(record),
        tiles=_tiles(record),
        charts=charts,
        # As with charts: the bar escapes its own texts.
        time_bar=Markup(ledger_bar(ledger)),  # noqa: S704
        time_rows=ledger_rows(ledger),
        goodput=f"{ledger.goodput:.1%}",
        comparison=_comparison(record),
        sources=_sources(record),
        rejections=_rejections(record),
        environment=list(flatten(_environment(record.environment))),
        packages=list(flatten(record.environment.get("packages", {}))),
        events=[_event(event) for event in record.events],
        recipe_text=recipe_text,
    )


def _environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The environment with only those of the packages that decide about numbers."""
    packages = environment.get("packages", {})
    main = {name: packages[name] for name in MAIN_PACKAGES if name in packages}
    return {**{key: value for key, value in environment.items() if key != "packages"}, **main}


def _tiles(record: Record) -> list[Tile]:
    if not record.steps:
        return [Tile("steps", "0")]
    last = record.steps[-1]
    seconds = record.step_time_s
    tiles = [
        Tile("steps", units.count(last["step"])),
        Tile("last loss", f"{last['loss']:.4f}"),
        Tile("tokens", units.count(record.tokens)),
        Tile("time in steps", units.duration(seconds)),
    ]
    if seconds > 0:
        tiles.append(Tile("tokens/s", units.count(record.tokens / seconds)))
    tiles.append(Tile("most memory", units.size(max(line["memory_bytes"] for line in record.steps))))
    if compared := bytes_read(record):
        read, needed = compared
        tiles.append(Tile("data read", f"{units.size(read)}, {read / needed:.2f} × needed"))
    if record.attempts > 1:
        tiles.append(Tile("attempts", str(record.attempts)))
    return tiles


def _charts(record: Record) -> Iterator[tuple[str, str]]:
    names = sorted({name for evaluation in record.evaluations for name in evaluation.losses})
    evaluated = [
        Series(name, [(float(e.step), e.losses[name]) for e in record.evaluations if name in e.losses], marks=True)
        for name in names
    ]
    train = Series("train loss", series(record, "loss"), noisy=True)
    yield "Loss", line_chart([train, *evaluated], lambda y: f"{y:.4g}")
    rate = Series("learning rate", series(record, "learning_rate"))
    yield "Learning rate", line_chart([rate], lambda y: f"{y:.1e}")
    norm = Series("gradient norm", series(record, "grad_norm"), noisy=True)
    yield "Gradient norm, before clipping", line_chart([norm], lambda y: f"{y:.3g}")
    speed = Series("tokens/s", series(record, "tokens_per_s"), noisy=True)
    yield "Throughput, tokens/s", line_chart([speed], units.count)
    wait = Series("waiting", series(record, "data_wait_s", _wait_share), noisy=True)
    yield "Share of the step spent waiting for data", line_chart([wait], lambda y: f"{y:.1%}")
    memory = Series("memory", series(record, "memory_bytes", lambda line: line["memory_bytes"] / 2**30))
    yield "Memory, GiB", line_chart([memory], lambda y: f"{y:.3g}")


def _wait_share(line: Mapping[str, Any]) -> float:
    seconds = float(line["step_s"])
    return float(line["data_wait_s"]) / seconds if seconds > 0 else 0.0


def _comparison(record: Record) -> list[tuple[str, str, str, str]]:
    """(eval set, before, after, change) as text."""
    return [
        (name, f"{before:.4f}", f"{after:.4f}", change(before, after))
        for name, (before, after) in before_and_after(record).items()
    ]


def change(before: float, after: float) -> str:
    """`-31.2 %`; empty where there is nothing to compare with."""
    return f"{(after - before) / before:+.1%}" if before > 0 else ""


def _sources(record: Record) -> list[tuple[str, list[str]]]:
    """(source, cells), the cells in the order of the template's headings."""
    total = sum(counts.tokens for counts in record.data.values()) or 1
    return [(name, _cells(counts, counts.tokens / total)) for name, counts in record.data.items()]


def _cells(counts: Counts, share: float) -> list[str]:
    others = [counts.truncated, counts.split, counts.lost_tokens, sum(counts.rejected.values())]
    return [
        *map(units.count, [counts.rows, counts.tokens, counts.supervised]),
        f"{share:.1%}",
        *map(units.count, others),
    ]


def _rejections(record: Record) -> list[tuple[str, str, str, str]]:
    """(source, reason, rows, share of the source's rows) of every reason for which a source lost rows."""
    return [
        (name, reason, units.count(number), f"{number / max(counts.rows, 1):.1%}")
        for name, counts in record.data.items()
        for reason, number in sorted(counts.rejected.items())
    ]


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf of nested mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, str(value)


def _event(event: Mapping[str, Any]) -> tuple[str, str, str]:
    """(time, event, the rest) of an event line."""
    rest = {key: value for key, value in event.items() if key not in ("time", "event")}
    return str(event["time"]), str(event["event"]), "  ".join(f"{k}={v}" for k, v in flatten(rest))
