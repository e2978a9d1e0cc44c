"""Checkpoints that are damaged or taken by another attempt, as a run and the commands meet them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import recipe_for, write_recipe
from training import QuietMonitor, read_run, train

from ftlaunch.distributed import entry
from ftlaunch.distributed.checkpoint.commit import CommitRecord, commit, list_commits
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.distributed.world import World
from ftlaunch.launcher import cli
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

STEPS = {"train": {"max_steps": 4, "lr_scheduler": "constant"}, "evaluate": {"at_start": False, "at_end": False}}


def missing(path: Path) -> str:
    path.unlink()
    return "not found"


def truncated(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-7])
    return "bytes, "


@pytest.mark.parametrize("damage", [missing, truncated])
def test_a_damaged_newest_checkpoint_is_named_and_another_is_taken_only_when_told(
    tmp_path, monkeypatch, capsys, damage
):
    """As the base of another run, and by the commands that open a run's newest. Running the recipe again is another
    matter: that goes back by itself, and says so (test_async_saves.py)."""
    monkeypatch.chdir(tmp_path)
    run = train(recipe_for(tmp_path, checkpoint={"every_steps": 2, "keep_last": 2}, **STEPS))
    said = damage(run.checkpoint / "model.safetensors")
    for words in (
        ["plan", "next.yaml"],
        ["pull", "tiny", "here"],
        ["export", "tiny", "--to", "there"],
        ["generate", "tiny", "alpha"],
    ):
        write_recipe(tmp_path / "next.yaml", recipe_for(tmp_path, name="next", model={"path": str(run.directory)}))
        assert cli.main(words) == 1
        text = " ".join("".join(capsys.readouterr()).split())
        assert "step 4 is not usable" in text and "step-000004.a1/model.safetensors" in text and said in text, text
        assert "another one" in text and "those of steps 2" in text and "step-000002.a1" in text
    assert not (tmp_path / "here").exists() and not (tmp_path / "there").exists()
    assert cli.main(["pull", "tiny@2", "here"]) == 0
    after = train(recipe_for(tmp_path, name="next", model={"path": str(run.directory / "step-000002.a1")}, **STEPS))
    assert len(after.steps) == 4


class Overtaken(QuietMonitor):
    """After a step another attempt commits the checkpoint that this one is about to save."""

    def __init__(self, directory: Path, theirs: Path) -> None:
        self.directory, self.theirs = directory, theirs
        self.messages: list[str] = []

    def emit(self, event: Any) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            shutil.copytree(self.theirs, self.directory / "step-000002.a9")
            commit(str(self.directory), CommitRecord(2, 9, "step-000002.a9", "2026-01-01T00:00:00+00:00"))
        if event["kind"] == "message":
            self.messages.append(event["text"])


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_attempt_that_another_was_quicker_than_loses_cleanly(tmp_path, mode):
    """The other's files stay as they are, its own go, and both go on from what was committed."""
    checkpoint = {"every_steps": 2, "keep_last": 9, "keep_training_state": 9, "mode": mode}
    twin = train(recipe_for(tmp_path, name="twin", checkpoint=checkpoint, **STEPS))
    theirs = tmp_path / "theirs"
    shutil.copytree(twin.directory / "step-000002.a1", theirs)
    manifest = json.loads((theirs / "MANIFEST.json").read_text()) | {"attempt": 9}
    (theirs / "MANIFEST.json").write_text(json.dumps(manifest))
    settings = recipe_for(tmp_path, checkpoint=checkpoint, **STEPS)
    directory = Path(settings["checkpoint"]["path"]) / "tiny"
    monitor = Overtaken(directory, theirs)
    loaded = LoadedRecipe(Recipe.model_validate(settings), "test.yaml", (), ())
    assert entry.run_rank(entry.Job(loaded, World(), "", monitor, ("test",))) == "finished"
    records = list_commits(str(directory), pytest.fail)
    assert [(record.step, record.directory) for record in records] == [(2, "step-000002.a9"), (4, "step-000004.a1")]
    assert not (directory / "step-000002.a1").exists()
    for path in theirs.rglob("*.safetensors"):
        kept = directory / "step-000002.a9" / path.relative_to(theirs)
        assert kept.read_bytes() == path.read_bytes()
    assert all(verify_checkpoint(str(directory / record.directory)) == [] for record in records)
    events = [json.loads(line) for file in directory.glob("events*.jsonl") for line in file.read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "checkpoint_kept"] == [2]
    assert read_run(directory).losses == twin.losses
