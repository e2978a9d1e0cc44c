"""report.html and what it is made of."""

from __future__ import annotations

import json
import math
import re

import pytest

from ftlaunch.launcher.charts import Series, line_chart, nice_ticks, running_mean, thin_out, tick_texts
from ftlaunch.launcher.record import Counts, Record, before_and_after, make_record, parse_lines
from ftlaunch.launcher.report import render_report


def step(number: int, attempt: int = 1, **more: object) -> dict[str, object]:
    return {
        "kind": "step",
        "step": number,
        "attempt": attempt,
        "loss": 3.0 / number,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens": 100 * number,
        "tokens_per_s": 50.0,
        "data_wait_s": 0.5,
        "step_s": 2.0,
        "memory_bytes": 1 << 30,
        "progress": number / 10,
        **more,
    }


def evaluation(number: int, loss: float, attempt: int = 1) -> dict[str, object]:
    return {"kind": "evaluation", "step": number, "attempt": attempt, "losses": {"tickets/loss": loss}}


def record(*lines: dict[str, object], events: tuple[dict[str, object], ...] = ()) -> Record:
    return make_record(lines, events, {"torch": "2.13", "world": {"size": 2}})


SOURCE = {"rows": 90, "tokens": 3000, "supervised": 1000, "rejected": {"empty_answer": 7}, "truncated": 2}


def test_of_a_step_done_twice_the_later_attempt_counts():
    both = record(step(1), step(2), step(3, loss=9.0), step(2, attempt=2, loss=1.0))
    assert [(line["step"], line["attempt"]) for line in both.steps] == [(1, 1), (2, 2)]
    assert both.tokens == 200
    assert both.step_time_s == 4.0
    assert both.attempts == 2


def test_an_evaluation_beyond_the_resume_point_was_taken_back():
    lines = [evaluation(0, 5.0), step(1), step(2), evaluation(2, 4.0), step(3), evaluation(3, 3.0), step(3, attempt=2)]
    assert [each.step for each in record(*lines).evaluations] == [0, 2]


def test_before_and_after_are_the_first_and_the_last_measurement():
    assert before_and_after(record(evaluation(0, 5.0), evaluation(5, 4.0), evaluation(9, 3.0))) == {
        "tickets/loss": (5.0, 3.0)
    }


def test_a_line_cut_short_by_a_crash_is_left_out():
    assert parse_lines('{"kind": "step"}\n{"kind": "st') == [{"kind": "step"}]


def test_the_latest_data_counts_are_kept():
    first = {"kind": "data", "step": 1, "attempt": 1, "sources": {"a": {"rows": 1}}}
    second = {"kind": "data", "step": 1, "attempt": 2, "sources": {"a": {"rows": 2}}}
    assert record(second, first).data == {"a": Counts(rows=2)}


def page(of: Record) -> str:
    return render_report(of, name="support-bot", state="finished", recipe_text="name: support-bot\n")


def test_the_page_holds_everything_and_nothing_from_outside():
    data = {"kind": "data", "step": 2, "attempt": 1, "sources": {"tickets": SOURCE}}
    events = ({"time": "2026-01-01T00:00:00Z", "event": "checkpoint", "step": 2},)
    html = page(record(evaluation(0, 4.0), step(1), step(2), evaluation(2, 2.0), data, events=events))
    wanted = [
        "-50.0%",
        '<td>empty_answer</td><td class="n">7</td><td class="n">7.8%</td>',
        "tickets",
        "Learning rate",
        "world.size",
        "name: support-bot",
        "step=2",
    ]
    assert [part for part in wanted if part not in html] == []
    assert re.findall(r"(?:https?:)?//[a-z]+\.|\bsrc=|<link", html) == []


def test_texts_from_data_and_recipe_cannot_become_markup():
    evil = "<script>alert(1)</script>"
    data = {"kind": "data", "step": 1, "attempt": 1, "sources": {evil: {**SOURCE, "rejected": {evil: 1}}}}
    losses = {"kind": "evaluation", "step": 1, "attempt": 1, "losses": {f'"{evil}': 1.0}}
    events = ({"time": evil, "event": evil, "text": evil},)
    html = render_report(
        make_record([step(1), data, losses], events, {evil: evil}), name=evil, state=evil, recipe_text=evil
    )
    assert evil not in html
    assert html.count("<script>") == 1
    assert "&lt;script&gt;" in html


def test_a_run_without_steps_still_has_a_page():
    assert "steps" in page(record())


def test_values_that_are_not_finite_are_not_drawn():
    svg = line_chart([Series("loss", [(1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 1.0)])], str)
    [polyline] = re.findall(r'points="([^"]*)"', svg)
    assert len(polyline.split()) == 2
    assert line_chart([Series("loss", [(1.0, math.nan)])], str) == ""


def test_hover_data_is_what_was_drawn():
    svg = line_chart([Series("a<b", [(1.0, 2.0), (2.0, 4.0)])], lambda y: f"{y:.1f}")
    [data] = re.findall(r'data-hover="([^"]*)"', svg)
    parsed = json.loads(data.replace("&quot;", '"').replace("&lt;", "<"))
    assert parsed["series"] == [{"name": "a<b", "points": [[1.0, "2.0"], [2.0, "4.0"]]}]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.37, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]), (5, 5, [2, 3, 4, 5, 6, 7, 8])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_ticks_close_together_can_be_told_apart():
    assert tick_texts([1.0, 2.0], lambda y: f"{y:.1f}") == ["1.0", "2.0"]
    assert tick_texts([3.46570, 3.46572, 3.46574], lambda y: f"{y:.3g}") == ["3.46570", "3.46572", "3.46574"]


def test_noise_looks_level():
    svg = line_chart([Series("loss", [(1.0, 3.4657), (2.0, 3.46570001)])], lambda y: f"{y:.4g}")
    [polyline] = re.findall(r'points="([^"]*)"', svg)
    first, second = (float(point.split(",")[1]) for point in polyline.split())
    assert abs(first - second) < 1


def test_all_packages_are_there_but_folded():
    html = page(make_record([], [], {"python": "3.12", "packages": {"torch": "2.13.0", "zzz": "9.9"}}))
    assert html.index("2.13.0") < html.index("all 2 packages") < html.index("9.9")


def test_thinning_out_keeps_the_spike_and_the_order():
    points = [(float(i), 100.0 if i == 777 else i % 7) for i in range(10_000)]
    thin = thin_out(points)
    assert (777.0, 100.0) in thin
    assert len(thin) <= 602
    assert thin == sorted(thin)


def test_the_running_mean_of_a_straight_line_is_the_line():
    points = [(float(i), 2.0) for i in range(100)]
    assert running_mean(points) == points
