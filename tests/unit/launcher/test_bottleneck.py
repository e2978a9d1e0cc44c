"""When data is called the bottleneck, and what is said then."""

from __future__ import annotations

import io

from rich.console import Console

from ftlaunch.launcher.bottleneck import WAITING_S, WAITING_SHARE, bytes_read, data_bottleneck, waiting_share
from ftlaunch.launcher.record import Record, make_record
from ftlaunch.launcher.report import render_report
from ftlaunch.launcher.summary import show_summary, summarise

MIB = 2**20


def run(waits: list[float], *, read: int = MIB, needed: int = MIB, attempt: int = 1, first: int = 1) -> Record:
    return make_record(lines(waits, read=read, needed=needed, attempt=attempt, first=first), [], {})


def lines(waits, *, read=MIB, needed=MIB, attempt=1, first=1):
    """Steps of one second that waited so long."""
    return [
        {
            "kind": "step", "step": first + number, "attempt": attempt, "loss": 1.0, "tokens": 10, "step_s": 1.0,
            "data_wait_s": wait, "data_read_bytes": read, "data_needed_bytes": needed, "learning_rate": 1e-4,
            "grad_norm": 1.0, "tokens_per_s": 10.0, "memory_bytes": 2**30,
        }
        for number, wait in enumerate(waits)
    ]  # fmt: skip


def test_waiting_is_counted_without_the_first_step_of_each_attempt():
    record = make_record(lines([0.9, 0.2, 0.4]) + lines([0.9, 0.3], attempt=2, first=4), [], {})
    assert waiting_share(record) == (0.2 + 0.4 + 0.3) / 3


def test_up_to_the_threshold_nothing_is_said():
    assert data_bottleneck(run([0.9, *[WAITING_SHARE - 0.001] * 20])) is None
    assert data_bottleneck(run([])) is None
    assert data_bottleneck(run([0.9])) is None


def test_seconds_count_too():
    """Of a run of a few steps nobody wants to hear that it could have been a moment shorter."""
    assert data_bottleneck(run([0.0, WAITING_S / 2, WAITING_S / 4])) is None
    assert data_bottleneck(run([0.0, WAITING_S / 2, WAITING_S / 2])) is not None


def test_above_it_there_is_a_remedy():
    said = data_bottleneck(run([0.0, *[0.25] * 4]))
    assert said is not None
    assert "waited for it in 25% of the time" in said
    assert "data.reader_processes" in said
    assert "row groups" not in said


def test_blocks_that_are_read_again_and_again_are_named():
    said = data_bottleneck(run([0.0, 0.5, 0.5], read=800 * MIB, needed=200 * MIB))
    assert said is not None
    assert "2.34 GiB were read to serve 600 MiB" in said
    assert "row groups" in said


def test_bytes_are_compared_only_where_there_are_enough():
    few, many = run([0.0, 1.0], read=8 * MIB, needed=2 * MIB), run([0.0], read=600 * MIB, needed=500 * MIB)
    assert bytes_read(few) is None
    assert "row groups" not in str(data_bottleneck(few))
    assert "600 MiB, 1.20 × needed" in render_report(many, name="bot", state="finished", recipe_text="")


def test_the_summary_and_the_report_say_it():
    slow, fine = run([0.0, 0.5, 0.5]), run([0.0, 0.01, 0.01])
    for record, expected in ((slow, True), (fine, False)):
        console = Console(file=io.StringIO(), width=200)
        show_summary(summarise(record, run="bot", checkpoint="", report="report.html"), console)
        page = render_report(record, name="bot", state="finished", recipe_text="")
        for text in (console.file.getvalue(), page):
            assert ("the data is the bottleneck" in text) is expected
