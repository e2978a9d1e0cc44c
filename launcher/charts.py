"""Line charts as SVG text, drawn here so that a report needs nothing from outside. Pure."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 42
MAX_POINTS = 600
SMOOTH_FROM = 40
"""Below this many points every one of them can be seen, and a smoothed line would hide them."""


@dataclass(frozen=True)
class Series:
    """A line: (x, y) points ascending in x. `noisy`: draw it faint under its own running mean. `marks`: show each
    point."""

    name: str
    points: Sequence[Point]
    noisy: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Scale:
    """A linear map of [low, high] to [start, stop] pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def line_chart(series: Sequence[Series], number: Callable[[float], str]) -> str:
    """An SVG of the series over optimizer steps; `number` writes the values of the y axis. Points that are not
    finite are left out; without any other an empty text is returned."""
    drawn = [Series(each.name, _finite(each.points), each.noisy, each.marks) for each in series]
    drawn = [each for each in drawn if each.points]
    if not drawn:
        return ""
    x, y = _scales(drawn)
    parts = [_frame(x, y, number)]
    parts += [_line(each, color, x, y) for color, each in enumerate(drawn)]
    hover = {"x": [x.low, x.high, x.start, x.stop], "series": [_hover(each, number) for each in drawn]}
    data = escape(json.dumps(hover), quote=True)
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" data-hover="{data}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>{_legend(drawn)}</figure>'
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _scales(series: Sequence[Series]) -> tuple[Scale, Scale]:
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    x_low, x_high = min(xs), max(xs)
    ticks = nice_ticks(*_visible(min(ys), max(ys)))
    return (
        Scale(x_low, x_high if x_high > x_low else x_low + 1, LEFT, WIDTH - RIGHT),
        Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP),
    )


def _visible(low: float, high: float) -> tuple[float, float]:
    """The range widened to a thousandth of its values: less is noise, and shall look like a level line."""
    missing = max(abs(low), abs(high)) / 1000 - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers (1, 2 or 5 times a power of ten apart) within and around [low, high]."""
    if high <= low:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _frame(x: Scale, y: Scale, number: Callable[[float], str]) -> str:
    lines = []
    ticks = _ticks_within(y, wanted=5)
    for tick, text in zip(ticks, tick_texts(ticks, number), strict=True):
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        lines.append(_label(LEFT - 8, y(tick) + 4, "end", text))
    lines += [_label(x(tick), HEIGHT - BOTTOM + 18, "middle", f"{tick:,.0f}") for tick in _whole(_ticks_within(x, 6))]
    lines.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "middle", "step"))
    return "".join(lines)


def tick_texts(ticks: Sequence[float], number: Callable[[float], str]) -> list[str]:
    """The ticks' labels; ticks too close for `number` to tell apart get as many digits as they need."""
    texts = [number(tick) for tick in ticks]
    if len(set(texts)) == len(texts):
        return texts
    apart = min(after - before for before, after in itertools.pairwise(ticks))
    return [f"{tick:.{max(0, -math.floor(math.log10(apart)))}f}" for tick in ticks]


def _ticks_within(scale: Scale, wanted: int) -> list[float]:
    return [tick for tick in nice_ticks(scale.low, scale.high, wanted) if scale.low <= tick <= scale.high]


def _whole(ticks: Sequence[float]) -> list[float]:
    return [tick for tick in ticks if tick == int(tick)]


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(series: Series, color: int, x: Scale, y: Scale) -> str:
    smooth = series.noisy and len(series.points) >= SMOOTH_FROM
    parts = [_path(thin_out(series.points), f"c{color}{' faint' if smooth else ''}", x, y)]
    if smooth:
        parts.append(_path(thin_out(running_mean(series.points)), f"c{color}", x, y))
    if series.marks or len(series.points) == 1:
        parts += [f'<circle class="c{color}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>' for a, b in series.points]
    return "".join(parts)


def _path(points: Sequence[Point], css: str, x: Scale, y: Scale) -> str:
    coordinates = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    return f'<polyline class="{css}" points="{coordinates}"/>'


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Each point's mean with its neighbours, over about a twentieth of the line."""
    reach = max(1, len(points) // 40)
    values = [y for _, y in points]
    means = []
    for index, (x, _) in enumerate(points):
        window = values[max(0, index - reach) : index + reach + 1]
        means.append((x, sum(window) / len(window)))
    return means


def thin_out(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points, keeping the lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _hover(series: Series, number: Callable[[float], str]) -> dict[str, object]:
    points = thin_out(series.points)
    return {"name": series.name, "points": [[x, number(y)] for x, y in points]}


def _legend(series: Sequence[Series]) -> str:
    items = [
        f'<span class="key"><i class="c{color}"></i>{escape(each.name)} <b data-value></b></span>'
        for color, each in enumerate(series)
    ]
    return f'<figcaption>{"".join(items)}<span class="key at" data-at></span></figcaption>'
