"""Where a run's time went: every second once, whatever happened to the run."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.distributed.run_directory import Process, RunDirectory
from ftlaunch.launcher.goodput.bar import ledger_bar, ledger_line, ledger_rows
from ftlaunch.launcher.goodput.ledger import PARTS, Ledger, Life, Wait, make_ledger
from ftlaunch.launcher.goodput.lives import read_ledger


def step(number: int, attempt: int, seconds: float = 2.0, waited: float = 0.5) -> dict[str, object]:
    return {"kind": "step", "step": number, "attempt": attempt, "step_s": seconds, "data_wait_s": waited}


def evaluation(number: int, attempt: int, seconds: float) -> dict[str, object]:
    return {"kind": "evaluation", "step": number, "attempt": attempt, "losses": {}, "seconds": seconds}


def saved(number: int, attempt: int, stall_s: float) -> dict[str, object]:
    return {"kind": "checkpoint", "step": number, "attempt": attempt, "seconds": 9.0, "save_stall_s": stall_s}


def ready(attempt: int, second: float) -> dict[str, object]:
    moment = datetime.fromtimestamp(second, UTC).isoformat(timespec="milliseconds")
    return {"time": moment, "attempt": attempt, "event": "phase", "phase": "training"}


def parts(**seconds: float) -> dict[str, float]:
    return {**dict.fromkeys(PARTS, 0.0), **{name.replace("_", " "): value for name, value in seconds.items()}}


def test_a_run_that_nobody_disturbed():
    metrics = [evaluation(0, 1, 1.5), step(1, 1), step(2, 1, 3.0, 0.0), saved(2, 1, 0.25)]
    ledger = make_ledger([Life(1, 100.0, 120.0, "finished")], [], metrics, [ready(1, 110.0)])
    expected = parts(training=4.5, data=0.5, evaluation=1.5, saving=0.25, other=3.25) | {"start-up": 10.0}
    assert ledger.seconds == pytest.approx(expected)
    assert ledger.total_s == pytest.approx(20.0)
    assert ledger.goodput == pytest.approx(4.5 / 20)
    assert ledger.losses()[0] == ("start-up", 10.0)


def test_what_is_done_again_after_a_kill_is_lost_and_so_is_the_broken_step():
    first = [step(1, 1), saved(1, 1, 1.0), step(2, 1), evaluation(2, 1, 1.0), step(3, 1)]
    second = [step(2, 2), step(3, 2)]
    lives = [Life(1, 0.0, 20.0, None), Life(2, 25.0, 40.0, "finished")]
    ledger = make_ledger(lives, [], first + second, [ready(1, 5.0), ready(2, 30.0)])
    # Of the first attempt 15 s after it was ready: a step and a save count (3 s), the other 12 s are lost.
    assert ledger.seconds["lost work"] == pytest.approx(12.0)
    assert ledger.seconds["down"] == pytest.approx(5.0)
    assert ledger.seconds["start-up"] == pytest.approx(10.0)
    assert ledger.seconds["training"] == pytest.approx(4.5)
    assert ledger.total_s == pytest.approx(40.0)


def test_a_run_that_the_user_stopped_is_paused_and_a_failed_one_is_down():
    metrics = [step(1, 1), step(2, 2)]
    events = [ready(1, 1.0), ready(2, 101.0)]

    def of(outcome: str | None) -> Ledger:
        return make_ledger([Life(1, 0.0, 10.0, outcome), Life(2, 100.0, 110.0, "finished")], [], metrics, events)

    assert of("interrupted").paused_s == 90.0
    assert of("interrupted").total_s == 20.0
    assert of("failed").paused_s == 0.0
    assert of("failed").seconds["down"] == 90.0
    assert of(None).total_s == 110.0


def test_a_queue_is_waiting_and_not_start_up():
    events = [ready(1, 70.0), ready(2, 170.0)]
    waits = [Wait(0.0, 50.0), Wait(120.0, 150.0)]
    lives = [Life(1, 60.0, 100.0, "interrupted"), Life(2, 155.0, 200.0, "alive")]
    ledger = make_ledger(lives, waits, [step(1, 1, 2.0, 0.0)], events)
    assert ledger.seconds["waiting"] == 80.0
    assert ledger.seconds["start-up"] == 10.0 + 10.0 + 5.0 + 15.0
    assert ledger.paused_s == 20.0
    assert ledger.total_s == 200.0 - 20.0


def test_a_cluster_that_preempts_and_starts_again_has_the_run_wait():
    lives = [Life(1, 10.0, 20.0, "interrupted"), Life(2, 50.0, 60.0, "finished")]
    ledger = make_ledger(lives, [Wait(0.0, 8.0)], [step(1, 1), step(2, 2)], [ready(1, 11.0), ready(2, 51.0)])
    assert ledger.seconds["waiting"] == 8.0 + 30.0
    assert ledger.paused_s == 0.0


def test_ranks_that_saved_and_left_for_other_nodes_were_down_and_not_paused():
    lives = [Life(1, 0.0, 20.6, "interrupted"), Life(2, 30.0, 40.0, "interrupted"), Life(3, 90.0, 95.0, "finished")]
    ledger = make_ledger(lives, [], [], [ready(number, 0.0) for number in (1, 2, 3)], failures=[20.0])
    assert ledger.seconds["down"] == pytest.approx(9.4)
    assert ledger.paused_s == pytest.approx(50.0)


def test_an_attempt_that_never_trained_is_start_up():
    ledger = make_ledger([Life(1, 0.0, 30.0, "failed")], [], [], [])
    assert ledger.seconds["start-up"] == 30.0
    assert ledger.goodput == 0.0


def test_a_run_without_attempts_has_no_time():
    ledger = make_ledger([], [], [], [])
    assert ledger.total_s == 0.0
    assert ledger.goodput == 0.0
    assert ledger_bar(ledger) == ""
    assert ledger_rows(ledger) == []


def test_measured_steps_are_never_cut_short_by_an_old_sign_of_life():
    """Killed between two heartbeats, by a version that wrote no time into its lines."""
    ledger = make_ledger([Life(1, 0.0, 4.0, None)], [], [step(1, 1, 6.0, 0.0)], [ready(1, 3.0)])
    assert ledger.seconds["training"] == 6.0
    assert ledger.total_s == 9.0


def test_a_process_that_stood_by_began_when_it_was_given_the_work(tmp_path):
    """It was started while the ranks before it still lived; until it was needed nothing of the run was its own."""
    run = RunDirectory(str(tmp_path / "bot"))
    for started, began in ((1000.0, None), (1020.0, 1052.0)):
        run.claim_attempt(world_size=1, command=(), process=replace(Process.this(), started=started), began=began)
    events = [ready(1, 1010.0), ready(2, 1053.0)]
    lines = [{**step(1, 1, 40.0, 0.0), "time": 1050.0}, {**step(2, 2, 7.0, 0.0), "time": 1060.0}]
    spent = read_ledger(run, lines, events, 1060.0).seconds
    assert spent == parts(training=47.0, down=2.0) | {"start-up": 11.0}


@st.composite
def histories(draw: st.DrawFn):
    """Attempts one after the other, each with some steps, evaluations and saves that fit into its time."""
    now, lives, metrics, events, waits = 0.0, [], [], [], []
    length = st.floats(0, 50, allow_nan=False)
    for number in range(1, draw(st.integers(1, 5)) + 1):
        idle = draw(length)
        if draw(st.booleans()):
            submitted = now + draw(st.floats(0, 1)) * idle
            waits.append(Wait(submitted, submitted + draw(st.floats(0, 1)) * (now + idle - submitted)))
        began = now = now + idle
        outcome = draw(st.sampled_from(["finished", "interrupted", "failed", None]))
        if draw(st.booleans()):
            now += draw(length)
            events.append(ready(number, now))
            at = draw(st.integers(1, 6))
            for offset in range(draw(st.integers(0, 4))):
                seconds = draw(st.floats(0.01, 5))
                metrics += [step(at + offset, number, seconds, seconds * draw(st.floats(0, 1)))]
                metrics += [saved(at + offset, number, 0.5)] if draw(st.booleans()) else []
                now += seconds + 0.5
        now += draw(length)
        lives.append(Life(number, began, now, outcome))
    return lives, waits, metrics, events


@given(histories())
def test_every_second_is_in_one_part(history):
    lives, waits, metrics, events = history
    ledger = make_ledger(lives, waits, metrics, events)
    since = min([lives[0].began, *(wait.submitted for wait in waits if wait.began <= lives[0].began)])
    # Moments are kept to the millisecond.
    assert ledger.total_s + ledger.paused_s == pytest.approx(lives[-1].ended - since, abs=0.01 * len(lives))
    assert all(seconds >= -0.002 for seconds in ledger.seconds.values())
    assert 0 <= ledger.goodput <= 1


def test_what_people_see():
    ledger = Ledger(parts(training=90.0, saving=7.0, lost_work=3.0))
    assert ledger_line(ledger) == "goodput 90.0% of 1 min 40 s; saving 7.0 s, lost work 3.0 s"
    assert [(part, time, share) for part, time, share, _ in ledger_rows(ledger)] == [
        ("training", "1 min 30 s", "90.0%"),
        ("saving", "7.0 s", "7.0%"),
        ("lost work", "3.0 s", "3.0%"),
    ]
    svg = re.search(r"<svg.*</svg>", ledger_bar(ledger))
    assert svg is not None
    pieces = ElementTree.fromstring(svg[0]).findall("rect")
    assert [float(piece.get("width", 0)) for piece in pieces] == [900.0, 70.0, 30.0]
    assert [float(piece.get("x", 0)) for piece in pieces] == [0.0, 900.0, 970.0]
    assert len({piece.get("class") for piece in pieces}) == 3
