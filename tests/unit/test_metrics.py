"""What a step's numbers become: TensorBoard's curves, W&B's; and memory."""

from __future__ import annotations

import sys

import pytest

from ftlaunch.distributed.memory import memory_bytes
from ftlaunch.distributed.metrics import TensorBoard, open_trackers
from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe


def test_tensorboard_reads_every_value(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoard(str(tmp_path))
    for step in range(1, 25):
        writer.log(step, {"train/loss": 4.0 / step, "train/tokens": 1000.0 * step})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/tokens"]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 25))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([4.0 / s for s in range(1, 25)])


def tracked_by_wandb(folder) -> Recipe:
    sections = {"model": {"path": "m"}, "data": {"train": [{"path": "d"}]}, "track": {"wandb": {"project": "p"}}}
    return Recipe.model_validate({"name": "n", "checkpoint": {"path": str(folder)}, **sections})


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The real client, which writes to a folder where it may not reach its server; a process has one session of it."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield
    wandb.teardown()


def test_wandb_hears_every_value(tmp_path, offline):
    import wandb

    recipe = tracked_by_wandb(tmp_path)
    board, tracker = open_trackers(recipe, str(tmp_path / "n"))
    tracker.log(1, {"train/loss": 4.25, "train/tokens": 1000.0})
    for one in (board, tracker):
        one.close()
    wandb.teardown()  # its service writes the file, in a process of its own, and ends with this
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in written.read_bytes() and b"4.25" in written.read_bytes()


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"track.wandb.*pip install 'ftlaunch\[wandb\]'"):
        open_trackers(tracked_by_wandb(tmp_path), str(tmp_path / "n"))


def test_wandb_without_a_key(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match=r"track.wandb: .*WANDB_API_KEY"):
        open_trackers(tracked_by_wandb(tmp_path), str(tmp_path / "n"))


def test_resident_memory_is_that_of_now():
    before = memory_bytes(World())
    filled = bytearray(b"x" * 64 * 2**20)
    assert memory_bytes(World()) - before > len(filled) // 2
