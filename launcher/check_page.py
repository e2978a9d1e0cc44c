"""The page of a check: figures, plots, findings, and samples token by token. One file, nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ..distributed.data.template import TextEncoder
from ..recipes.methods.base import Sample
from ..recipes.redact import redact
from . import units
from .check_findings import SEVERITIES, Finding, counts
from .check_plot import histogram_svg
from .check_result import Result
from .check_tally import Tally, histogram
from .check_view import lengths_text, looked_at, predicted
from .page import render_template
from .report import Tile
from .unknown import Unknown

SHOWN_TOKENS = 800
NAMED_ROWS = 200
"""Rows of a finding that the page names; the JSON has more."""

LOST = "\ufffd"


class Token(NamedTuple):
    """A token as the page shows it. `css`: its classes; `title`: what pointing at it says."""

    text: str
    css: str
    title: str


class Bar(NamedTuple):
    """A labelled share, 0 to 1."""

    label: str
    share: float
    text: str


class Shown(NamedTuple):
    """A sample and its tokens; `more` that are not shown."""

    row: str
    length: int
    targets: int
    tokens: list[Token]
    more: int


def render_page(result: Result, encoder: TextEncoder, secrets: Sequence[str]) -> str:
    """The page, without secrets."""
    from markupsafe import Markup

    plots = [
        (tally.name, Markup(_histogram(tally, result.recipe.data.sequence_length)))  # noqa: S704 - numbers only
        for tally in result.tallies
        if tally.lengths
    ]
    page = render_template(
        "check.html.j2",
        name=result.recipe.name,
        tiles=_tiles(result),
        severities=[(severity, number) for severity, number in counts(list(result.findings)).items() if number],
        findings=[(finding, finding.rows[:NAMED_ROWS]) for finding in result.findings],
        sources=[_source_cells(tally, result.seed) for tally in result.tallies],
        plots=plots,
        supervised=[Bar(t.name, t.supervised_share, f"{t.supervised_share:.1%}") for t in result.tallies if t.fitted],
        fill=_fill_bars(result),
        found=_found_bars(result.findings),
        samples=[(tally.name, [show(sample, encoder) for sample in tally.shown]) for tally in result.tallies],
    )
    return redact(page, [*secrets, *(escape(secret) for secret in secrets)])


def _histogram(tally: Tally, sequence_length: int) -> str:
    return histogram_svg(histogram(tally.lengths), sequence_length, alarming=not tally.is_split)


def _tiles(result: Result) -> list[Tile]:
    rows, tokens = sum(tally.rows for tally in result.tallies), sum(tally.tokens for tally in result.tallies)
    supervised = sum(tally.supervised for tally in result.tallies)
    steps, epochs = result.duration.steps, result.duration.epochs
    tiles = [
        Tile("rows looked at", units.count(rows)),
        Tile("of about", units.count(sum(tally.estimated_rows for tally in result.tallies))),
        Tile("supervised tokens", f"{supervised / tokens:.1%}" if tokens else "–"),
        Tile("sequence length", units.count(result.recipe.data.sequence_length)),
    ]
    if not isinstance(steps, Unknown):
        tiles.append(Tile("steps, about", units.count(steps)))
    if not isinstance(epochs, Unknown):
        tiles.append(Tile("epochs, about", f"{epochs:.1f}"))
    return tiles


def _source_cells(tally: Tally, seed: int) -> tuple[str, str, list[str]]:
    """(name, how much of it was looked at, cells in the order of the template's headings)."""
    cells = [
        f"{tally.side}, {tally.row_format}",
        units.count(tally.plan.files),
        units.size(tally.plan.bytes),
        units.count(tally.estimated_rows),
        units.count(tally.estimated_tokens),
        f"{tally.supervised_share:.1%}",
        lengths_text(tally) if tally.lengths else "–",
    ]
    return tally.name, looked_at(tally, seed), cells


def _fill_bars(result: Result) -> list[Bar]:
    if result.fill is None:
        return []
    packed, padded = result.fill.packed, result.fill.padded
    chosen = result.recipe.data.packing
    return [
        Bar("packed" + (" (this recipe)" if chosen else ""), packed, f"{packed:.1%}"),
        Bar("one sample each" + ("" if chosen else " (this recipe)"), padded, f"{padded:.1%}"),
    ]


def _found_bars(findings: Sequence[Finding]) -> list[tuple[str, Bar]]:
    """(severity, bar) of findings about rows, by how many rows they are about."""
    rows = [finding for finding in findings if finding.count]
    most = max((finding.count for finding in rows), default=1)
    rows.sort(key=lambda finding: (SEVERITIES.index(finding.severity), -finding.count))
    return [(each.severity, Bar(f"{each.where}: {each.code}", each.count / most, f"{each.count:,}")) for each in rows]


def show(sample: Sample, encoder: TextEncoder) -> Shown:
    """The sample's tokens, each with its text and number."""
    ids = sample.input_ids[:SHOWN_TOKENS].tolist()
    supervised = predicted(sample)
    tokens = [
        Token(text, "t s" if supervised[place] else "t", _title(place, ids[place], encoder, bool(supervised[place])))
        for place, text in enumerate(token_texts(ids, encoder))
    ]
    return Shown(str(sample.row), len(sample), sample.num_targets, tokens, max(0, len(sample) - SHOWN_TOKENS))


def _title(place: int, token: int, encoder: TextEncoder, supervised: bool) -> str:
    name = encoder.tokenizer.id_to_token(token)
    return f"{place}: id {token}  {name!r}{'  supervised' if supervised else ''}"


def token_texts(ids: Sequence[int], encoder: TextEncoder) -> list[str]:
    """The text that each token adds. A token that holds a part of a character adds nothing; the one that completes it
    adds it whole. Decoded from a little before, since tokenizers treat a beginning in their own way."""
    texts = []
    done = 0
    for end in range(1, len(ids) + 1):
        begin = max(0, done - 4)
        before, now = encoder.decode(ids[begin:done]), encoder.decode(ids[begin:end])
        unfinished = now.endswith(LOST) and end < len(ids) and end - done < 4
        texts.append("" if unfinished else now[len(before) :])
        done = done if unfinished else end
    return texts
