"""The view: what a person sees of a run, on a terminal and in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ftlaunch.launcher.view import LiveView, PlainView, State, advance, make_view, panel, remaining_s


def step(number: int, progress: float, **more: float) -> dict[str, object]:
    return {
        "kind": "step",
        "step": number,
        "progress": progress,
        "loss": 2.5,
        "learning_rate": 1e-4,
        "tokens_per_s": 12_345.0,
        "memory_bytes": 3 << 30,
        **more,
    }


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def output(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def test_a_log_gets_the_first_step_every_tenth_and_one_after_a_pause():
    log, clock = console(False), Clock()
    view = PlainView(log, clock)
    for number in range(1, 25):
        clock.now = 1.0 * number
        view.update(step(number, number / 100))
    clock.now += 60
    view.update(step(25, 0.25))
    shown = [int(line.split()[1]) for line in output(log).splitlines()]
    assert shown == [1, 10, 20, 25]


def test_of_quick_steps_that_are_not_all_told_one_in_ten_is_shown():
    log = console(False)
    view = PlainView(log, Clock())
    for number in (1, 7, 13, 19, 26, 32, 38, 44, 51, 99, 101):
        view.update(step(number, number / 200))
    assert [int(line.split()[1]) for line in output(log).splitlines()] == [1, 13, 26, 32, 44, 51, 99, 101]


def test_every_other_event_is_one_line():
    log = console(False)
    with PlainView(log, Clock()) as view:
        view.update({"kind": "phase", "phase": "loading the model"})
        view.update({"kind": "evaluation", "step": 0, "losses": {"tickets/loss": 1.25, "general/loss": 2.0}})
        view.update({"kind": "checkpoint", "step": 5, "path": "/runs/x/" + "long/" * 40})
        view.update({"kind": "message", "text": "[red]not markup[/red]", "level": "warning"})
    lines = output(log).splitlines()
    assert lines[0] == "loading the model …"
    assert lines[1] == "evaluation at step 0: tickets/loss 1.2500  general/loss 2.0000"
    assert lines[2].startswith("saved step 5: /runs/x/long/")
    assert lines[3] == "[red]not markup[/red]"
    assert len(lines) == 4


def test_a_log_names_each_phase_once():
    log = console(False)
    with PlainView(log, Clock()) as view:
        for phase in ("training", "saving", "training", "saving", "training"):
            view.update({"kind": "phase", "phase": phase})
    assert output(log).splitlines() == ["training …", "saving …"]


def test_time_left_is_extrapolated_from_the_first_step_seen():
    state = advance(State(), step(50, 0.5), 100.0)  # resumed in the middle
    assert state.eta_s is None
    state = advance(state, step(60, 0.6), 120.0)
    assert state.eta_s == pytest.approx(80.0)


def test_time_left_given_by_the_run_wins():
    assert advance(State(), step(1, 0.1, eta_s=7.0), 0.0).eta_s == 7.0


def test_no_progress_means_no_estimate():
    assert remaining_s((0.0, 0.2), (10.0, 0.2)) is None


def test_the_panel_shows_the_figures():
    state = advance(State(), step(1, 0.25, grad_norm=0.5, eta_s=3725.0), 0.0)
    state = advance(state, {"kind": "evaluation", "step": 1, "losses": {"a/loss": 1.5}}, 1.0)
    state = advance(state, {"kind": "checkpoint", "step": 1, "path": "p"}, 1.0)
    screen = console(True)
    screen.print(panel(state, 1.0))
    text = output(screen)
    wanted = ["step 1", "25.0%", "1 h 02 min left", "2.5000", "1.000e-04", "12.3k", "3 GiB", "0.500", "a/loss 1.5000"]
    assert [part for part in wanted if part not in text] == []
    assert re.search(r"saved +step 1\b", text)


def test_before_the_first_step_the_panel_says_what_goes_on():
    screen = console(True)
    screen.print(panel(advance(State(), {"kind": "phase", "phase": "building the index"}, 0.0), 1.0))
    assert "building the index … " in output(screen)


def test_a_long_phase_shows_that_time_goes_on():
    screen = console(True)
    screen.print(panel(advance(State(), {"kind": "phase", "phase": "starting Ray"}, 10.0), 75.0))
    assert "starting Ray …  1 min 05 s" in output(screen)


def test_the_live_view_leaves_its_last_figures_behind():
    screen = console(True)
    with LiveView(screen, Clock()) as view:
        view.update(step(3, 1.0))
        view.update({"kind": "message", "text": "done"})
    text = output(screen)
    assert "step      3  100.0%" in text.rstrip().splitlines()[-1]


@pytest.mark.parametrize(("terminal", "kind"), [(True, LiveView), (False, PlainView)])
def test_the_view_fits_the_console(terminal: bool, kind: type):
    assert type(make_view(console(terminal))) is kind
