"""A disk that is full in mid-run: training goes on or stops, as the recipe says; what was saved before stays whole."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from harness import run_distributed
from tiny import recipe_for
from training import QuietMonitor, read_run, train_all

from ftlaunch.distributed import entry
from ftlaunch.distributed.checkpoint import shared
from ftlaunch.distributed.checkpoint.commit import list_commits
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.distributed.world import World
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

SIZE = "24m"
"""Some checkpoints of the small model."""


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command, so no small disk can be made")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted (needs root): {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class Filler(QuietMonitor):
    """Fills the disk to the last byte after one step, when the save before it has been committed, and makes room again
    after another."""

    def __init__(self, disk: Path, fill_after: int, free_after: int | None) -> None:
        self.saved = disk / "runs" / "tiny" / "commits" / f"step-{fill_after - 2:06d}.json"
        self.ballast, self.fill_after, self.free_after = disk / "ballast", fill_after, free_after
        self.messages: list[str] = []

    def emit(self, event):
        if event["kind"] == "message":
            self.messages.append(event["text"])
        if event["kind"] == "step" and event["step"] == self.fill_after:
            self._fill()
        if event["kind"] == "step" and event["step"] == self.free_after:
            self.ballast.unlink()

    def _fill(self) -> None:
        while not self.saved.exists():
            time.sleep(0.005)
        with self.ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == 28


def train_on_it(rank, size, recipe, folder, disk, free_after, in_place):
    if not in_place:
        shared.LOCAL_FILE_SYSTEMS = frozenset()
    monitor = Filler(disk, 4, free_after) if rank == 0 else QuietMonitor()
    loaded = LoadedRecipe(Recipe.model_validate(recipe), "test.yaml", (), ())
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    try:
        outcome = entry.run_rank(entry.Job(loaded, world, f"file://{folder}/rendezvous", monitor, ("test",)))
    except Exception as error:
        return type(error).__name__, str(error), []
    return outcome, "", monitor.messages if rank == 0 else []


def run(tmp_path, disk, checkpoint, *, free_after=None, in_place=True):
    keep = {"keep_last": 99, "keep_training_state": 99, "every_steps": 2, "path": str(disk / "runs")}
    recipe = recipe_for(tmp_path, checkpoint={**keep, **checkpoint})
    return run_distributed(train_on_it, 2, recipe, str(tmp_path), disk, free_after, in_place, connect=False)


def steps_of(directory: Path) -> list[int]:
    records = list_commits(str(directory), pytest.fail)
    assert all(verify_checkpoint(str(directory / record.directory)) == [] for record in records)
    return [record.step for record in records]


@pytest.mark.parametrize(("mode", "in_place"), [("async", True), ("sync", True), ("async", False)])
def test_training_goes_on_with_a_warning(tmp_path, disk, mode, in_place):
    """The save of step 4 finds the disk full; after step 5 there is room again. No line of the metrics is lost."""
    checkpoint = {"mode": mode, "on_error": "continue"}
    endings = run(tmp_path, disk, checkpoint, free_after=5, in_place=in_place)
    assert [ending[0] for ending in endings] == ["finished"] * 2, endings
    directory = disk / "runs" / "tiny"
    assert steps_of(directory) == [2, 6, 8]
    (said,) = [text for text in endings[0][2] if "was not saved" in text]
    assert "step 4 was not saved" in said
    assert "o space" in said
    assert not list(directory.glob("step-000004*"))
    trained = read_run(directory)
    assert [line["step"] for line in trained.steps] == list(range(1, 9))
    (plain,) = train_all([recipe_for(tmp_path, name="plain")], 2)
    assert trained.losses == plain.losses


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_training_stops_and_says_why(tmp_path, disk, mode):
    endings = run(tmp_path, disk, {"mode": mode})
    assert all("o space" in ending[1] for ending in endings), endings
    assert all("step-000004.a1" in ending[1] for ending in endings), endings
    assert steps_of(disk / "runs" / "tiny") == [2]
    (disk / "ballast").unlink()
    (tmp_path / "rendezvous").unlink()
    keep = {"keep_last": 99, "keep_training_state": 99, "every_steps": 2, "path": str(disk / "runs")}
    (again,) = train_all([recipe_for(tmp_path, checkpoint=keep)], 2)
    assert steps_of(again.directory) == [2, 4, 6, 8]
