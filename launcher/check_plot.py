"""Histograms as SVG text, in the style of `charts`. Pure."""

from __future__ import annotations

import math

from .charts import Scale, nice_ticks
from .check_tally import Histogram

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 18, 42


def histogram_svg(shown: Histogram, limit: int, *, alarming: bool) -> str:
    """Bars over tokens, all equally wide. A line shows `limit` (data.sequence_length) where it lies within;
    `alarming`: bars beyond it stand out."""
    bins = len(shown.counts)
    ticks = [tick for tick in nice_ticks(0, int(shown.counts.max()), 4) if tick == int(tick)]
    x, y = Scale(0, bins, LEFT, WIDTH - RIGHT), Scale(0, ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>' for t in ticks]
    parts += [_text(LEFT - 8, y(tick) + 4, "end", f"{tick:,.0f}") for tick in ticks]
    parts += [_bar(shown, number, x, y, limit if alarming else math.inf) for number in range(bins)]
    every = max(1, math.ceil(bins / 8))
    parts += [
        # The last one ends where the picture does.
        _text(x(number), HEIGHT - BOTTOM + 17, "end" if number == bins else "middle", f"{shown.edges[number]:,.0f}")
        for number in range(0, bins + 1, every)
    ]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", "tokens in a sample"))
    parts += _limit_line(shown, x, limit)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _bar(shown: Histogram, number: int, x: Scale, y: Scale, limit: float) -> str:
    first, behind = shown.edges[number], shown.edges[number + 1]
    count = int(shown.counts[number])
    if not count:
        return ""
    left, width = x(number) + 0.75, max(1.0, x(number + 1) - x(number) - 1.5)
    css = "bar beyond" if first > limit else "bar"
    what = f"{first:,.0f} to {behind - 1:,.0f} tokens: {count:,}"
    return (
        f'<rect class="{css}" x="{left:.1f}" width="{width:.1f}" y="{y(count):.1f}" height="{y(0) - y(count):.1f}">'
        f"<title>{what}</title></rect>"
    )


def _limit_line(shown: Histogram, x: Scale, limit: int) -> list[str]:
    """Within its bin the line stands where the limit lies in proportion."""
    if not shown.edges[0] <= limit < shown.edges[-1]:
        return []
    number = max(place for place, edge in enumerate(shown.edges[:-1]) if edge <= limit)
    first, behind = shown.edges[number], shown.edges[number + 1]
    place = x(number + float((limit - first) / (behind - first)))
    anchor = "start" if place < WIDTH / 2 else "end"
    return [
        f'<line class="limit" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP - 6}" y2="{HEIGHT - BOTTOM}"/>',
        _text(place + (5 if anchor == "start" else -5), TOP - 6, anchor, f"sequence length {limit:,}"),
    ]


def _text(x: float, y: float, anchor: str, text: str) -> str:
    """Only numbers and fixed words come here, so there is nothing to escape."""
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
