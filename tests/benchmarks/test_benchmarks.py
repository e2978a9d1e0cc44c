"""Every benchmark's smallest setting runs and writes what it found; the arithmetic of ratios."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = (
    "step_overhead", "launch", "loss_memory", "packing", "order_scale", "packed_attention", "stream", "stream_resume",
    "stream_memory", "checkpoint_save", "checkpoint_load", "step_strategies", "plan_memory",
)  # fmt: skip
LIGHT = {
    "launch": ["--only", "light"],
    "packed_attention": ["--device", "cpu"],
    "stream": ["--peers", "hf_datasets"],
    "stream_resume": ["--sides", "ours"],
    "checkpoint_save": ["--ranks", "2"],
    "checkpoint_load": ["--ranks", "1", "--sides", "raw", "ours_fsdp", "dcp"],
    "step_strategies": ["--strategies", "fsdp"],
}
"""A launch is tested elsewhere; starting Ray once more would prove nothing here. Most peers of the stream need
environments of their own, and DeepSpeed by hand a compiler."""


@pytest.fixture
def harness():
    """benchmarks/harness.py; its bare name belongs to another module of the tests."""
    spec = importlib.util.spec_from_file_location("benchmarks_harness", BENCHMARKS / "harness.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_setting_writes_its_results(tmp_path, name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *LIGHT.get(name, [])], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["benchmark"] == name
    assert result["quick"] and result["rounds"] == 1
    assert {"commit", "command", "versions", "cores", "seed", "load_average"} <= set(result)
    assert str(tmp_path) not in json.dumps(result)
    for table in result["tables"]:
        assert set(table["ratios"]) == set(table["values"]) - {table["base"]} != set()
        assert all(len(values) == 1 for values in table["values"].values())
    assert (tmp_path / f"{name}.md").read_text().strip() in done.stdout


@pytest.mark.parametrize(
    ("target", "content", "sides"),
    [("s3", "weights", ("raw_upload", "ours_uploaded")), ("disk", "state", ("raw", "ours_streamed", "zero_to_fp32"))],
)
def test_saves_to_a_store_and_of_the_whole_state(tmp_path, target, content, sides):
    command = [sys.executable, str(BENCHMARKS / "checkpoint_save.py"), "--quick", "--out", str(tmp_path)]
    command += ["--ranks", "2", "--target", target, "--content", content, "--sides", *sides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "checkpoint_save.json").read_text())
    (about,) = result["settings"].values()
    assert all(about["written / model bytes"][side] >= 1 for side in sides)
    assert about["written / model bytes"][sides[0]] == 1


def test_sides_take_turns(harness):
    log = []
    values = harness.interleave({"a": lambda: log.append("a") or 1.0, "b": lambda: log.append("b") or 2.0}, 3, "test")
    assert log == ["a", "b"] * 3
    assert values == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_a_ratio_is_paired_by_round(harness):
    # Both sides are slow in the second round: the machine was, not the side.
    ratio = harness.Ratio.of([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 3.0)
    assert harness.spread([9.0, 10.0, 12.0]) == pytest.approx(0.15)


def test_results_name_no_folder_of_this_machine(harness):
    assert harness._shown(["--rounds", "5", "--out", os.path.join(os.sep, "somewhere", "results")]) == [
        "--rounds",
        "5",
        "--out",
        "results",
    ]
