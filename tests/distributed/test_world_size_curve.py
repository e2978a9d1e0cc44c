"""One loss curve at every world size, and for a run whose world size changes in its course.

What a step trains on does not depend on the ranks, so curves differ by the order of fp32 sums alone.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny import recipe_for, text_rows, write_parquet
from training import Trained, train

from ftlaunch.launcher.charts import Series, line_chart

TOLERANCE = 1e-5
"""Relative. Measured: below 1e-6; a row lost, repeated or moved to another step differs by more than 1e-3."""

SEED = 11
CHANGES = (4, 2, 3, 1)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

STYLE = (
    "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}polyline{fill:none;stroke-width:1.5}"
    ".c0{stroke:#1f77b4}.c1{stroke:#ff7f0e}.c2{stroke:#2ca02c}.c3{stroke:#d62728}.c4{stroke:#9467bd}"
)
LEGEND = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd")


def curve_recipe(folder: Path, name: str, max_steps: int) -> dict[str, Any]:
    """Packing, two weighted sources of which one is split, three epochs of the smaller one, a batch that 3 and 4
    ranks do not divide."""
    is_new = not (folder / "model").exists()
    recipe = recipe_for(
        folder,
        name=name,
        data={"sequence_length": 96},
        train={
            "max_steps": max_steps,
            "global_batch_size": 6,
            "micro_batch_size": 1,
            "lr_scheduler": "constant",  # a run that is made longer must not change its rates
            "seed": SEED,
        },
        evaluate={"at_start": False, "at_end": False},
        checkpoint={"every_steps": None},
    )
    if is_new:
        write_parquet(folder / "text.parquet", text_rows(300, words=(1, 120)))
    return recipe


def run_at(folder: Path, world_size: int, steps: int) -> Trained:
    return train(curve_recipe(folder, f"world-{world_size}", steps), world_size)


def run_changing(folder: Path, steps: int) -> Trained:
    """One run that stops and goes on at another world size."""
    for number, world_size in enumerate(CHANGES, start=1):
        run = train(curve_recipe(folder, "changing", steps * number // len(CHANGES)), world_size)
    return run


def difference(run: Trained, reference: Trained) -> float:
    """Largest relative difference of the losses."""
    pairs = zip(run.losses, reference.losses, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def assert_same(run: Trained, reference: Trained) -> None:
    assert [step["step"] for step in run.steps] == [step["step"] for step in reference.steps]
    assert difference(run, reference) <= TOLERANCE
    for name in ("tokens", "supervised_tokens"):
        assert [step[name] for step in run.steps] == [step[name] for step in reference.steps]


def test_a_run_whose_world_size_changes_has_the_curve_of_one_that_stays(tmp_path):
    reference, changing = run_at(tmp_path, 1, 8), run_changing(tmp_path, 8)
    assert_same(changing, reference)
    assert len(set(reference.losses)) == 8


@pytest.mark.evidence
def test_world_size_curve(tmp_path):
    """40 steps at world sizes 1 to 4 and 4 -> 2 -> 3 -> 1; writes benchmarks/results/world_size_curve.{json,svg}."""
    steps = 40
    runs = {f"world size {size}": run_at(tmp_path, size, steps) for size in (1, 2, 3, 4)}
    runs[" → ".join(map(str, CHANGES))] = run_changing(tmp_path, steps)
    reference = runs["world size 1"]
    report = {
        "claim": "the loss curve of a recipe is the same at every world size, also when that changes in a run's course",
        "command": "make evidence NAME=test_world_size_curve",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "seed": SEED,
        "dtype": "float32",
        "steps": steps,
        "changes_after_steps": [steps * number // len(CHANGES) for number in range(1, len(CHANGES))],
        "tolerance": TOLERANCE,
        "largest_relative_difference": {name: difference(run, reference) for name, run in runs.items()},
        "losses": {name: run.losses for name, run in runs.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "world_size_curve.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "world_size_curve.svg").write_text(drawing({name: run.losses for name, run in runs.items()}))
    for run in runs.values():
        assert_same(run, reference)


def drawing(losses: dict[str, list[float]]) -> str:
    """The curves as an SVG of its own; where they agree, the last one hides the others."""
    chart = line_chart(
        [Series(name, list(enumerate(values, start=1))) for name, values in losses.items()],
        lambda value: f"{value:.2f}",
    )
    body = chart.partition("<svg")[2].partition(">")[2].partition("</svg>")[0]
    keys = "".join(
        f'<text x="470" y="{30 + 16 * number}" style="fill:{color}">{name}</text>'
        for number, (name, color) in enumerate(zip(losses, LEGEND, strict=True))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 250"><style>{STYLE}</style>'
        f'<rect width="640" height="250" fill="#fff"/>{body}{keys}</svg>\n'
    )
