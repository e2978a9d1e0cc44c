"""A check on a terminal, and as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.text import Text

from ..distributed.data.template import TextEncoder
from ..recipes.methods.base import Sample
from . import units
from .check_findings import SEVERITIES, Finding, Severity, counts
from .check_result import Result
from .check_tally import Histogram, Tally, histogram, quantile
from .unknown import Unknown

SHOWN_TOKENS = 400
SHOWN_ROWS: dict[Severity, int] = {"error": 50, "warning": 5, "advice": 3}
"""Rows named below a finding; the page and the JSON name more."""

SHOWN_ALIKE = 3
"""Of rows about which there is the same to say."""

SUPERVISED, CONTEXT = "bold green", "dim"
STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "advice": "cyan"}
BLOCKS = "▁▂▃▄▅▆▇█"


def result_lines(result: Result, encoder: TextEncoder, *, colours: bool) -> Iterator[Text]:
    """Everything, the verdict last."""
    for tally in result.tallies:
        yield from source_lines(tally, result.seed)
        yield from sample_lines(tally.shown, encoder, colours=colours)
    yield from recipe_lines(result)
    if result.findings:
        yield Text("\nfindings", style="bold")
    for finding in result.findings:
        yield from finding_lines(finding)
    yield Text("\n").append(verdict(result.findings))


def verdict(findings: Sequence[Finding]) -> Text:
    """`2 errors, 1 warning`."""
    found = counts(list(findings))
    names = {"error": "errors", "warning": "warnings", "advice": "pieces of advice"}
    ones = {"error": "error", "warning": "warning", "advice": "piece of advice"}
    parts = [
        Text(f"{found[each]} {ones[each] if found[each] == 1 else names[each]}", style=STYLES[each])
        for each in SEVERITIES
        if found[each]
    ]
    return Text(", ").join(parts) if parts else Text("nothing to complain about", style="green")


def source_lines(tally: Tally, seed: int) -> Iterator[Text]:
    """A source's figures."""
    yield Text(f"\n{tally.name} ({tally.side}, {tally.row_format})", style="bold")
    yield Text(f"  {_counted(tally.plan.files, 'file')}, {units.size(tally.plan.bytes)}; {looked_at(tally, seed)}")
    if not tally.fitted:
        return
    yield Text(
        f"  {_counted(len(tally.fitted), 'sample')}; "
        f"{tally.supervised_share:.1%} of {tally.tokens:,} tokens supervised"
        + ("" if tally.complete else f"; about {units.count(tally.estimated_tokens)} tokens in all")
        + (f"; {tally.held_out:,} rows held out" if tally.held_out else "")
    )
    yield Text(f"  tokens in a sample: {lengths_text(tally)}")
    yield Text(f"  {bars_text(histogram(tally.lengths))}")


def _counted(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def looked_at(tally: Tally, seed: int) -> str:
    """How much of a source was looked at."""
    if tally.complete:
        return f"all {tally.rows:,} rows looked at"
    about = "" if tally.known_rows is not None else "about "
    share = tally.rows / tally.estimated_rows if tally.estimated_rows else 0.0
    return f"{tally.rows:,} of {about}{units.count(tally.estimated_rows)} rows looked at ({share:.1%}, seed {seed})"


def lengths_text(tally: Tally) -> str:
    """`9 to 812, median 112, 95% up to 380`."""
    lengths = tally.lengths
    middle, most = quantile(lengths, 0.5), quantile(lengths, 0.95)
    return f"{min(lengths):,} to {max(lengths):,}, median {middle:,}, 95% up to {most:,}"


def bars_text(shown: Histogram) -> str:
    """The histogram in one line of blocks, between its first and last length."""
    most = max(1, int(shown.counts.max()))
    bars = "".join(BLOCKS[-(-int(count) * len(BLOCKS) // most) - 1] if count else " " for count in shown.counts)
    return f"{shown.edges[0]:,.0f} │{bars}│ {shown.edges[-1] - 1:,.0f}"


def recipe_lines(result: Result) -> Iterator[Text]:
    """What the data amounts to in this recipe."""
    steps, epochs, fill = result.duration.steps, result.duration.epochs, result.fill
    if isinstance(steps, Unknown) or isinstance(epochs, Unknown) or fill is None:
        return
    recipe = result.recipe
    yield Text("\nthe run", style="bold")
    yield Text(
        f"  about {steps:,} steps of {recipe.train.global_batch_size} sequences of {recipe.data.sequence_length:,} "
        f"tokens, {epochs:.1f} epochs"
    )
    full = fill.packed if recipe.data.packing else fill.padded
    yield Text(f"  sequences {full:.1%} full {'(packed)' if recipe.data.packing else '(one sample each)'}")


def finding_lines(finding: Finding) -> Iterator[Text]:
    """What, where, which rows, what to do."""
    head = Text(f"  {finding.severity:<8}", style=STYLES[finding.severity])
    yield head.append(finding.code, style="bold").append(f"  {finding.where}: {finding.what}", style="default")
    details = {row.detail for row in finding.rows}
    alike = len(details) == 1 and "" not in details
    shown = finding.rows[: SHOWN_ALIKE if alike else SHOWN_ROWS[finding.severity]]
    for row, detail in shown:
        yield Text(f"      {row}{': ' if detail else ''}{detail}")
    if finding.count > len(shown) > 0:
        yield Text(f"      … {finding.count - len(shown):,} more")
    yield Text(f"      → {finding.remedy}", style="dim")


# --- samples ----------------------------------------------------------------------------------------------------------


def sample_lines(samples: Sequence[Sample], encoder: TextEncoder, *, colours: bool) -> Iterator[Text]:
    """The samples as the model sees them, with what it learns to write standing out."""
    if samples:
        legend = Text("this is supervised", style=SUPERVISED) if colours else Text("⟦this is supervised⟧")
        yield Text("\n  samples: ").append_text(legend)
    for sample in samples:
        yield Text(f"  {sample.row} ({len(sample)} tokens)", style="underline" if colours else "")
        yield render_sample(sample, encoder, colours=colours)


def render_sample(sample: Sample, encoder: TextEncoder, *, colours: bool) -> Text:
    """One sample as text; supervised tokens are coloured, or between ⟦ and ⟧."""
    shown = Text()
    for text, supervised in spans(sample, encoder):
        if colours:
            shown.append(text, style=SUPERVISED if supervised else CONTEXT)
        else:
            shown.append(f"⟦{text}⟧" if supervised else text)
    more = len(sample) - SHOWN_TOKENS
    return shown.append(f" … {more} more tokens") if more > 0 else shown


def spans(sample: Sample, encoder: TextEncoder) -> Iterator[tuple[str, bool]]:
    """(text, supervised) of consecutive tokens. Texts are cut out of the whole, because tokenizers treat the
    beginning of a text in their own way."""
    ids = sample.input_ids[:SHOWN_TOKENS].tolist()
    supervised = predicted(sample)[:SHOWN_TOKENS]
    cuts = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    before = ""
    for start, stop in itertools.pairwise(cuts):
        text = encoder.decode(ids[:stop])
        yield text[len(before) :], bool(supervised[start])
        before = text


def predicted(sample: Sample) -> np.typing.NDArray[np.bool_]:
    """Which tokens count in the loss: nothing comes before the first to predict it from."""
    supervised = sample.supervised.copy()
    supervised[:1] = False
    return supervised


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_json(result: Result) -> dict[str, Any]:
    """Plain data."""
    duration = result.duration
    return {
        "name": result.recipe.name,
        "seed": result.seed,
        "counts": counts(list(result.findings)),
        "sources": [_source_json(tally) for tally in result.tallies],
        "steps": _plain(duration.steps),
        "epochs": _plain(duration.epochs),
        "fill": result.fill and {"packed": result.fill.packed, "padded": result.fill.padded},
        "findings": [_finding_json(finding) for finding in result.findings],
    }


def _plain(value: float | Unknown) -> float | str:
    return str(value) if isinstance(value, Unknown) else value


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "severity": finding.severity,
        "where": finding.where,
        "what": finding.what,
        "remedy": finding.remedy,
        "count": finding.count,
        "rows": [row._asdict() for row in finding.rows],
    }


def _source_json(tally: Tally) -> dict[str, Any]:
    shown = histogram(tally.lengths) if tally.lengths else None
    return {
        "name": tally.name,
        "side": tally.side,
        "format": tally.row_format,
        "files": tally.plan.files,
        "bytes": tally.plan.bytes,
        "rows_looked_at": tally.rows,
        "rows_estimated": round(tally.estimated_rows),
        "complete": tally.complete,
        "held_out": tally.held_out,
        "samples": len(tally.fitted),
        "tokens": tally.tokens,
        "tokens_estimated": round(tally.estimated_tokens),
        "supervised_share": tally.supervised_share,
        "lengths": shown and {"edges": shown.edges.tolist(), "counts": shown.counts.tolist()},
    }
