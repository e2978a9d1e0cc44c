"""A killed rank's GPU goes to the process that stood by for it."""

from __future__ import annotations

import os
from pathlib import Path

import chaos
import psutil
from cuda_rank import CUDA, train_on
from processes import Command, ftlaunch
from slow_steps import slow_steps
from tiny import recipe_for, write_recipe

STEPS = 30
ONE_GPU = {"type": "local", "gpus_per_node": 1}


def standing_by(command: Command) -> list[psutil.Process]:
    family = psutil.Process(command.process.pid).children(recursive=True)
    return [one for one in family if "StandingBy" in " ".join(one.cmdline()) and not chaos.is_rank(one)]


def test_a_process_that_stood_by_trains_on_the_gpu_of_the_rank_that_was_killed(tmp_path: Path):
    """With `train.deterministic` the losses are bitwise those of a run that nothing happened to."""
    train = {"max_steps": STEPS, "deterministic": True}
    recipe = recipe_for(tmp_path, name="killed", train=train, checkpoint={"every_steps": 5}, cluster=ONE_GPU)
    write_recipe(tmp_path / "killed.yaml", recipe)
    undisturbed = train_on(CUDA, {**recipe, "name": "undisturbed"})
    slow = slow_steps(tmp_path, 0.5, os.environ.get("PYTHONPATH", ""), standby_after_s=0.5)
    command = Command(ftlaunch("killed.yaml"), tmp_path, slow)
    directory = tmp_path / "runs" / "killed"
    assert command.wait_until(lambda: any(line["step"] >= 6 for line in chaos.steps_of(directory))), command.text
    assert command.wait_until(lambda: len(standing_by(command)) == 1), command.text
    [spare] = standing_by(command)
    [rank] = chaos.ranks(psutil.Process(command.process.pid).children(recursive=True))
    rank.kill()
    assert command.wait() == 0, command.text
    [log] = (directory / "logs").glob("a2.rank-*.log")
    assert f"process {spare.pid}" in log.read_text()
    by_step = {line["step"]: line["loss"] for line in chaos.steps_of(directory)}
    assert [by_step[step] for step in sorted(by_step)] == undisturbed.losses
