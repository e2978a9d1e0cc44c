"""Early stopping: when held-out loss no longer falls, and which checkpoint is worth keeping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import recipe_for, write_recipe
from training import Trained, read_run, train
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import entry
from ftlaunch.launcher import cli

METRIC = "chats/loss"
# So fast that the loss on rows it has not seen turns around within a few evaluations.
OVERFITTING = {"max_steps": 120, "learning_rate": 5e-2, "lr_scheduler": "constant"}


def overfitting(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that learns its few rows by heart."""
    recipe = recipe_for(
        folder,
        train=OVERFITTING,
        checkpoint={"every_steps": 2, "keep_last": 1},
        evaluate={"every_steps": 3, "early_stopping": {"metric": METRIC, "patience": 3}},
    )
    recipe["data"]["train"] = recipe["data"]["train"][:1]
    return {**recipe, **changes}


def evaluations(trained: Trained) -> list[tuple[int, float]]:
    return [(line["step"], line["losses"][METRIC]) for line in trained.lines if line["kind"] == "evaluation"]


def commits(directory: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics of the checkpoints that are kept."""
    records = [json.loads(path.read_text()) for path in (directory / "commits").iterdir()]
    return {record["step"]: record["metrics"] for record in records}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("early-stopping")


@pytest.fixture(scope="module")
def stopped(folder) -> Trained:
    return train(overfitting(folder), 2)


def test_a_run_stops_after_patience_evaluations_without_improvement(stopped):
    measured = evaluations(stopped)
    best_step, best_loss = min(measured, key=lambda pair: pair[1])
    after = [loss for step, loss in measured if step > best_step]
    assert len(after) == 3
    assert min(after) >= best_loss
    assert stopped.steps[-1]["step"] == best_step + 9 < OVERFITTING["max_steps"]
    result = json.loads((stopped.directory / "result.json").read_text())
    assert (result["outcome"], result["steps"]) == ("stopped_early", best_step + 9)


def test_the_best_checkpoint_outlives_newer_ones_and_is_pulled(stopped, tmp_path, monkeypatch, capsys):
    best_step, best_loss = min(evaluations(stopped), key=lambda pair: pair[1])
    kept = commits(stopped.directory)
    assert sorted(kept) == [best_step, best_step + 9]
    assert kept[best_step] == {METRIC: best_loss}
    monkeypatch.chdir(stopped.directory.parents[1])
    assert cli.main(["pull", "tiny@best", str(tmp_path / "best")]) == 0
    assert f"step {best_step}:" in capsys.readouterr().out
    [directory] = stopped.directory.glob(f"step-{best_step:06d}.a*")
    paths = (tmp_path / "best", directory)
    pulled, trained = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths)
    assert all(torch.equal(pulled[name], trained[name]) for name in trained)


def test_a_resumed_run_stops_where_the_whole_one_does(stopped, folder):
    """Cut while patience is running out: what was counted before is remembered."""
    best_step = min(evaluations(stopped), key=lambda pair: pair[1])[0]
    recipe = overfitting(folder, name="cut")
    recipe["train"] |= {"max_steps": best_step + 4}
    recipe["evaluate"] = {**recipe["evaluate"], "at_end": False}
    cut = train(recipe, 2)
    assert cut.steps[-1]["step"] == best_step + 4
    recipe["train"] |= OVERFITTING
    resumed = train(recipe, 2)
    assert evaluations(resumed) == evaluations(stopped)
    assert resumed.losses == stopped.losses
    assert commits(resumed.directory) == commits(stopped.directory)


def test_a_final_evaluation_belongs_to_the_final_checkpoint(tmp_path):
    """The cadence of saving meets the last step before that step is measured."""
    for number, changes in enumerate(({"max_steps": 4}, {"max_steps": None, "num_epochs": 1})):
        recipe = recipe_for(
            tmp_path,
            name=f"final-{number}",
            train=changes,
            checkpoint={"every_steps": 1},
            evaluate={"every_steps": 3, "early_stopping": {"metric": METRIC}},
        )
        path = write_recipe(tmp_path / f"final-{number}.yaml", recipe)
        assert entry.main([str(path)]) == 0
        trained = read_run(tmp_path / "runs" / f"final-{number}")
        step, loss = evaluations(trained)[-1]
        assert commits(trained.directory)[step] == {METRIC: loss}
