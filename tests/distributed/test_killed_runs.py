"""A run that is killed and started again ends with the weights it would have had: bitwise on the CPU.

Packing and two weighted sources are on, checkpoints are frequent, and every process of the run is killed at once, at
moments that a watcher of the run directory chooses: at start-up, between steps, in the middle of a save, after a
commit.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import pytest
from forked import run_forked
from processes import Command, ftlaunch, run, torchrun
from slow_steps import slow_steps
from tiny import recipe_for, write_recipe

from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher.history import read_history

STEPS = 10
STEP_S = 0.2
"""Long enough that a watcher on a busy machine sees a run at its last steps before it has ended."""
CHECKPOINTED = {"model.safetensors", "training/exp_avg.safetensors", "training/exp_avg_sq.safetensors"}

Moment = Callable[[Path], bool]


def started(directory: Path) -> bool:
    """An attempt is registered, and nothing else may be there yet."""
    return any((directory / "attempts").glob("a*.json"))


def reached(step: int) -> Moment:
    """The metrics tell of a step."""

    def happened(directory: Path) -> bool:
        log = directory / "metrics.jsonl"
        return log.exists() and f'"step":{step},' in log.read_text()

    return happened


def saving(step: int) -> Moment:
    """The step's directory is there and its commit is not."""

    def happened(directory: Path) -> bool:
        return any(directory.glob(f"step-{step:06d}.a*/*"))

    return happened


def committed(step: int) -> Moment:
    """The step's commit is there."""
    return lambda directory: (directory / "commits" / f"step-{step:06d}.json").exists()


def prepare(folder: Path, name: str) -> tuple[Path, Path]:
    """A recipe, and the directory its run will have."""
    recipe = recipe_for(folder, train={"max_steps": STEPS, "global_batch_size": 8}, checkpoint={"every_steps": 2})
    return write_recipe(folder / f"{name}.yaml", {**recipe, "name": name}), folder / "runs" / name


def final(directory: Path) -> dict[str, bytes]:
    """The last checkpoint's tensors, and the state of the data."""
    commit = json.loads((directory / "commits" / f"step-{STEPS:06d}.json").read_text())
    root = directory / commit["directory"]
    state = json.loads((root / "training/state.json").read_text())
    files = {name: (root / name).read_bytes() for name in CHECKPOINTED}
    return files | {"extent": json.dumps([state["extent"], state["stream"]], sort_keys=True).encode()}


def kill_at(commands: Sequence[Sequence[str]], folder: Path, directory: Path, moments: Sequence[Moment]) -> int:
    """Start, kill at the first moment, start again, kill at the second, …, and let it end, with commands in turns; the
    number of kills."""
    kills, turns = 0, itertools.cycle(commands)
    for moment, command in zip(moments, turns, strict=False):
        running = Command(command, folder, slow_steps(folder, STEP_S))
        if running.wait_until(lambda moment=moment: moment(directory)):
            kills += running.process.poll() is None
        running.kill()
    code, output = run(next(turns), folder)
    assert code == 0, output
    return kills


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def whole(folder):
    """What a run that nobody disturbs ends with, on two ranks."""
    recipe, directory = prepare(folder, "whole")
    code, output = run_forked(2, [str(recipe)], folder)
    assert code == 0, output
    return final(directory)


def test_killed_at_start_up_between_steps_and_in_mid_save(folder, whole):
    """Under torchrun and under Ray in turns."""
    recipe, directory = prepare(folder, "killed")
    ranks = "cluster.processes_per_node=2"
    commands = [torchrun(2, str(recipe), ranks), ftlaunch(str(recipe), ranks)]
    moments = [started, reached(3), saving(4), committed(6), reached(9)]
    assert kill_at(commands, folder, directory, moments) == len(moments)
    assert final(directory) == whole
    assert_every_second_is_accounted_for(directory)


def assert_every_second_is_accounted_for(directory: Path) -> None:
    """Where the time of a run went that was killed five times, and finished."""
    run_directory = RunDirectory(str(directory))
    history, attempts = read_history(run_directory), run_directory.attempts()
    seconds = history.ledger.seconds
    assert len(attempts) == 6
    assert [part for part in ("start-up", "lost work", "down", "saving", "evaluation") if seconds[part] <= 0] == []
    assert seconds["training"] + seconds["data"] == pytest.approx(history.record.step_time_s)
    ended = datetime.fromisoformat(run_directory.attempt_end(6)["ended_at"]).timestamp()
    # Processes' starts are known to a hundredth of a second.
    assert history.ledger.total_s == pytest.approx(ended - attempts[0].process.started, abs=0.05 * len(attempts))
    assert history.ledger.paused_s == 0


@pytest.mark.evidence
def test_kills_at_random_moments(folder, whole, tmp_path):
    """`make evidence NAME=random_moments`: five runs, each killed at five random moments, under Ray."""
    rng = random.Random(0)
    for number in range(5):
        recipe, directory = prepare(folder, f"random-{number}")
        steps = sorted(rng.sample(range(1, STEPS + 1), 4))
        moments = [started, *(rng.choice([reached, saving])(step + step % 2) for step in steps)]
        kill_at([ftlaunch(str(recipe), "cluster.processes_per_node=2")], folder, directory, moments)
        assert final(directory) == whole
        shutil.rmtree(directory)
