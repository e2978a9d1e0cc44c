"""A ledger for people: lines for a terminal, a bar for the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .. import units
from .ledger import PARTS, Ledger

WIDTH, HEIGHT = 1000, 26
COLOURS = {part: number % 8 for number, part in enumerate(PARTS)}
SMALL_S = 0.05
"""Of less than this nobody is told."""


def ledger_line(ledger: Ledger) -> str:
    """`goodput 91.2% of 12 min 05 s; start-up 40 s, saving 12 s`"""
    lost = ", ".join(f"{part} {units.duration(seconds)}" for part, seconds in ledger.losses() if seconds >= SMALL_S)
    return f"goodput {ledger.goodput:.1%} of {units.duration(ledger.total_s)}" + (f"; {lost}" if lost else "")


def ledger_rows(ledger: Ledger) -> list[tuple[str, str, str, str]]:
    """(part, time, share, what it means) of every part that took time."""
    total_s = ledger.total_s
    return [
        (part, units.duration(seconds), f"{seconds / total_s:.1%}", PARTS[part])
        for part, seconds in ledger.seconds.items()
        if seconds >= SMALL_S
    ]


def ledger_bar(ledger: Ledger) -> str:
    """An SVG: one bar, a piece for each part; empty for a run that took no time."""
    total_s = ledger.total_s
    if total_s <= 0:
        return ""
    drawn = [(part, seconds) for part, seconds in ledger.seconds.items() if seconds > 0]
    pieces, x = [], 0.0
    for part, seconds in drawn:
        width = WIDTH * seconds / total_s
        told = escape(f"{part}: {units.duration(seconds)}, {seconds / total_s:.1%}")
        place = f'x="{x:.2f}" width="{width:.2f}" height="{HEIGHT}"'
        pieces.append(f'<rect class="c{COLOURS[part]}" {place}><title>{told}</title></rect>')
        x += width
    bar = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{"".join(pieces)}</svg>'
    return f'<figure class="chart bar">{bar}{_legend([part for part, _ in drawn])}</figure>'


def _legend(parts: Sequence[str]) -> str:
    keys = [f'<span class="key"><i class="c{COLOURS[part]}"></i>{escape(part)}</span>' for part in parts]
    return f"<figcaption>{''.join(keys)}</figcaption>"
