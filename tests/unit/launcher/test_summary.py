"""The words at the end of a run, and the numbers in them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ftlaunch.launcher import units
from ftlaunch.launcher.hardware import _gpus_in_proc, this_machine
from ftlaunch.launcher.record import make_record
from ftlaunch.launcher.summary import show_summary, summarise


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9_999, "9,999"), (12_345, "12.3k"), (1_234_567, "1.23M"), (8.03e9, "8.03B"), (2e12, "2T")],
)
def test_counts(number, text):
    assert units.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (61 << 30, "61 GiB"), (1010 << 20, "1010 MiB")],
)
def test_sizes(number, text):
    assert units.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.51, "2.5 s"), (59, "59 s"), (65, "1 min 05 s"), (3725, "1 h 02 min"), (90_000, "25 h 00 min")],
)
def test_durations(seconds, text):
    assert units.duration(seconds) == text


def shown(checkpoint: str, *lines: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=60, color_system=None)
    record = make_record(lines, [], {})
    show_summary(summarise(record, run="bot", checkpoint=checkpoint, report="runs/bot/report.html"), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


STEP = {"kind": "step", "step": 9, "attempt": 1, "tokens": 5_000, "step_s": 2.0}


def test_a_checkpoint_on_a_store_is_pulled_first():
    text = shown("s3://acme/runs/bot/step-000009.a1", STEP)
    assert "ftlaunch pull bot DIR" in text
    assert 'from_pretrained("DIR")' in text
    assert "9 steps, 5,000 tokens, 2.0 s in steps, 2,500 tokens/s" in text


def test_a_long_path_can_be_copied_in_one_piece():
    place = "/data/" + "long/" * 30 + "step-000009.a1"
    assert f'from_pretrained("{place}")' in shown(place, STEP)


def test_rows_that_were_left_out_are_said():
    sources = {
        "a": {"rows": 60, "rejected": {"overlong": 10}},
        "b": {"rows": 40, "rejected": {"empty": 3, "overlong": 2}},
    }
    text = shown("", STEP, {"kind": "data", "step": 9, "attempt": 1, "sources": sources})
    assert "left out    15.0% of 100 rows read: 12 overlong, 3 empty" in text
    assert "left out" not in shown("", STEP)


def test_nothing_saved_offers_nothing():
    text = shown("")
    assert "none was saved" in text
    assert "from_pretrained" not in text


def test_this_machine_has_a_core_and_memory():
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes > 1 << 20


def test_gpus_are_counted_in_proc_where_the_tool_is_missing(tmp_path):
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:02:00.0").mkdir()
    assert _gpus_in_proc(tmp_path) == 2
    assert _gpus_in_proc(tmp_path / "none") == 0
