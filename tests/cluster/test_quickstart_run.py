"""`ftlaunch quickstart` start to end: real data, two runs under Ray on two ranks each, and the table."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the ranks are forked
from harness import run_distributed
from one_rank import Rank
from processes import Command, ftlaunch, run
from rich.console import Console
from training import Trained, read_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlaunch.distributed.saver import load_parts
from ftlaunch.distributed.world import World
from ftlaunch.launcher import cli, quickstart, quickstart_data, quickstart_probe, quickstart_table
from ftlaunch.recipes.load import load_recipe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STEPS = 8
HELD_OUT = 12
"""Rows of each held-out set."""

LOSS_TOLERANCE = 1e-5
"""Relative: two ranks sum losses of packed, sharded batches, and plain transformers those of padded rows, in fp32."""

LOGIT_TOLERANCE = 1e-4
"""Absolute, of logits up to some tens, in fp32: the same kernels on the same weights, sharded or whole."""

IN_PLAIN_TRANSFORMERS = """
import sys
import numpy, torch
from transformers import AutoModelForCausalLM
checkpoint, asked, answered = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
with torch.no_grad():
    logits = model(input_ids=torch.from_numpy(numpy.load(asked))).logits
numpy.save(answered, logits.float().numpy())
assert not [name for name in sys.modules if name.partition(".")[0] == "ftlaunch"]
"""


def prepare(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's folder as its first phase leaves it, with few steps and little data."""
    every_file = quickstart_data.source_files
    monkeypatch.setattr(quickstart_data, "source_files", lambda stdlib: every_file(stdlib)[::4])
    monkeypatch.setattr(quickstart, "BASE_STEPS", STEPS)
    monkeypatch.setattr(quickstart, "TUNED_STEPS", STEPS)
    monkeypatch.setattr(quickstart_data, "HELD_OUT_PAGES", HELD_OUT)
    quickstart.prepare(place, Console(file=io.StringIO()))
    held_out = place / "data/task/heldout.jsonl.gz"
    quickstart_data.write_jsonl_gz(held_out, quickstart_data.read_jsonl_gz(held_out)[:HELD_OUT])


def runs(place: Path) -> tuple[Trained, Trained]:
    """The base and the tuned run."""
    return read_run(place / "runs/base"), read_run(place / "runs/tuned")


def losses(trained: Trained) -> list[dict[str, float]]:
    """Held-out losses, in the order in which they were measured."""
    return [line["losses"] for line in trained.lines if line["kind"] == "evaluation"]


def written(place: Path) -> dict[Path, bytes]:
    """What the runs have written down, but for report.html, which tells of the time it was made."""
    files = [path for path in (place / "runs").rglob("*") if path.is_file() and path.name != "report.html"]
    return {path: path.read_bytes() for path in files}


def test_it_trains_twice_compares_and_answers_again_from_what_is_there(tmp_path, monkeypatch, capsys):
    place = tmp_path / "quick start"
    prepare(place, monkeypatch)
    code, said = run(ftlaunch("quickstart", place.name), tmp_path)
    assert code == 0, said
    base, tuned = runs(place)
    for trained in (base, tuned):
        assert json.loads((trained.directory / "result.json").read_text())["outcome"] == "finished"
        assert json.loads((trained.directory / "attempts/a1.json").read_text())["world_size"] == 2
        assert [step["step"] for step in trained.steps] == list(range(1, STEPS + 1))
        model, report = AutoModelForCausalLM.from_pretrained(trained.checkpoint, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert all(value.isfinite().all() for value in model.state_dict().values())
    start, end = losses(tuned)[0], losses(tuned)[-1]
    assert start["general/loss"] == pytest.approx(losses(base)[-1]["general/loss"], rel=LOSS_TOLERANCE)
    assert end["task/loss"] < start["task/loss"]
    shows_the_table(said, start, end)

    before = written(place)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["quickstart", place.name]) == 0
    shows_the_table(capsys.readouterr().out, start, end)
    assert written(place) == before
    for name in ("base", "tuned"):
        assert cli.main(["plan", str(place / f"{name}.yaml")]) == 0


def shows_the_table(said: str, start: dict[str, float], end: dict[str, float]) -> None:
    """Both models' columns, and a row for each held-out set with the losses that the run measured."""
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in said.splitlines() if line.count("│") > 3}
    for row, name in (
        ("loss on the task", "task/loss"),
        ("loss on general text (a rise is forgetting)", "general/loss"),
    ):
        assert [cell.strip() for cell in rows[row]] == [f"{values[name]:.3f}" for values in (start, end)], said
    assert any("base" in line and "tuned" in line and "change" in line for line in said.splitlines())
    assert f"answers that parse as Python, of {HELD_OUT}" in rows
    assert "files that neither model was trained on" in said


@pytest.mark.evidence
def test_quickstart_whole(tmp_path):
    """In its full size; writes benchmarks/results/quickstart.json."""
    started = time.monotonic()
    command = Command(ftlaunch("quickstart", "qs"), tmp_path)
    assert command.process.wait() == 0, command.text  # minutes, on shared machines more
    wall_s = time.monotonic() - started
    place = tmp_path / "qs"
    _, tuned = runs(place)
    start, end = losses(tuned)[0], losses(tuned)[-1]
    outcome = quickstart.compare(place)
    fall = 1 - end["task/loss"] / start["task/loss"]
    difference = largest_logit_difference(place, tuned.checkpoint, tmp_path)
    recipe = load_recipe(place / "tuned.yaml", environ={}).recipe
    report = {
        "claim": "the quickstart teaches its base model a task, by reading prompts, and plain transformers opens it",
        "command": "make evidence NAME=test_quickstart_whole",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "seed": recipe.train.seed,
        "dtype": recipe.model.dtype,
        "ranks": recipe.cluster.processes_per_node,
        "steps": {"base": quickstart.BASE_STEPS, "tuned": quickstart.TUNED_STEPS},
        "data": json.loads((place / "data/counts.json").read_text()),
        "held_out_loss": {name: {"base": start[name], "tuned": end[name]} for name in sorted(end)},
        "task_loss_fall": fall,
        "task_loss_in_plain_transformers": sides(outcome, "reloaded_loss"),
        "task_loss_with_prompts_exchanged": sides(outcome, "shuffled_loss"),
        "parsing_share": sides(outcome, "parsing_share"),
        "largest_logit_difference": difference,
        "wall_s": round(wall_s, 1),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "quickstart.json").write_text(json.dumps(report, indent=1) + "\n")
    assert fall >= 0.3
    assert outcome.tuned.reloaded_loss == pytest.approx(end["task/loss"], rel=LOSS_TOLERANCE)
    # A model that ignored its prompt would not notice.
    assert outcome.tuned.shuffled_loss > 1.25 * outcome.tuned.reloaded_loss
    assert difference <= LOGIT_TOLERANCE


def sides(outcome: quickstart_table.Outcome, name: str) -> dict[str, float]:
    """A figure of both models."""
    return {"base": getattr(outcome.base, name), "tuned": getattr(outcome.tuned, name)}


def largest_logit_difference(place: Path, checkpoint: Path, folder: Path) -> float:
    """On held-out rows: between the trained model, resumed on two ranks, and the checkpoint in plain transformers in a
    process without ftlaunch."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = quickstart_data.read_jsonl_gz(place / "data/task/heldout.jsonl.gz")
    input_ids, _, _ = quickstart_probe.answer_batch(tokenizer, rows[:16])
    np.save(folder / "asked.npy", input_ids.numpy())
    files = [str(folder / name) for name in ("asked.npy", "answered.npy")]
    code, said = run([sys.executable, "-c", IN_PLAIN_TRANSFORMERS, str(checkpoint), *files], folder)
    assert code == 0, said
    settings = load_recipe(place / "tuned.yaml", environ={}).recipe.model_dump()
    trained, _ = run_distributed(logits_of_the_engine, 2, settings, checkpoint, input_ids)
    return float(np.abs(np.load(folder / "answered.npy") - trained).max())


def logits_of_the_engine(rank: int, size: int, settings: dict[str, Any], checkpoint: Path, ids: torch.Tensor) -> Any:
    """The logits of the trained model as its run has left it, sharded as it was."""
    made = Rank.build(settings, World(rank=rank, size=size, local_rank=rank, local_size=size))
    load_parts(made.engine, str(checkpoint), made.built.has_adapter)
    made.engine.module.eval()
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        logits = made.engine.module({"input_ids": ids, "position_ids": positions, "targets": ids}, "own_logits")
    return logits.float().numpy().copy()
