"""Ends and failures that only some ranks, or only a second start, see."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RanksFailed, run_distributed
from tiny import recipe_for
from training import QuietMonitor, train

from ftlaunch.distributed import entry, loop
from ftlaunch.distributed import group as groups
from ftlaunch.distributed.attempt import Attempt
from ftlaunch.distributed.data.stream import Stream
from ftlaunch.distributed.run_directory import RunDirectory, utc_now
from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe


def test_a_run_killed_after_its_early_stop_does_not_train_on(tmp_path):
    """Its last checkpoint is committed, its end is not written yet."""
    stopping = {"metric": "chats/loss", "patience": 2, "min_delta": 100.0}
    recipe = recipe_for(
        tmp_path, evaluate={"every_steps": 2, "early_stopping": stopping}, checkpoint={"every_steps": None}
    )
    first = train(recipe)
    assert [step["step"] for step in first.steps] == [1, 2, 3, 4]
    assert [path.name for path in (first.directory / "commits").iterdir()] == ["step-000004.json"]
    (first.directory / "result.json").unlink()
    again = train(recipe)
    assert len(again.steps) == 4
    assert json.loads((again.directory / "result.json").read_text())["outcome"] == "stopped_early"


def test_what_one_rank_cannot_restore_ends_all_ranks_as_the_users_mistake(tmp_path, monkeypatch):
    """Otherwise the others would report a broken connection, which is tried again."""
    recipe = recipe_for(tmp_path, evaluate={"at_start": False, "at_end": False}, train={"max_steps": 2})
    train(recipe, 2)
    restore = Stream.restore

    def refuses(self: Stream, states: Any) -> None:
        restore(self, states)
        if 1 in self._share.streams:
            raise UserError("row 7 is refused now")

    monkeypatch.setattr(Stream, "restore", refuses)
    with pytest.raises(RanksFailed) as caught:
        train({**recipe, "train": {**recipe["train"], "max_steps": 3}}, 2)
    assert str(caught.value).count("errors.UserError: ") == 2
    assert "errors.InfrastructureError: " not in str(caught.value)


def test_logs_that_cannot_be_opened_end_all_ranks_and_the_attempt(tmp_path, monkeypatch):
    def missing(*_args: Any) -> None:
        raise UserError("wandb is not installed")

    monkeypatch.setattr(entry.Recorder, "open", missing)
    with pytest.raises(RanksFailed) as caught:
        train(recipe_for(tmp_path), 2)
    assert "errors.InfrastructureError: " not in str(caught.value)
    end = json.loads((tmp_path / "runs" / "tiny" / "attempts" / "a1.end.json").read_text())
    assert (end["outcome"], end["message"]) == ("failed", "wandb is not installed")


def test_an_adapter_stays_with_the_checkpoint_that_it_began_on(tmp_path):
    """Its base is a run that goes on while the adapter is half trained."""
    shared: dict[str, Any] = {"evaluate": {"at_start": False, "at_end": False}, "checkpoint": {"every_steps": None}}
    numbers = {"lr_scheduler": "constant", "learning_rate": 1e-2}
    base = recipe_for(tmp_path, name="base", **shared, train={"max_steps": 2, **numbers})
    tuned: dict[str, Any] = {"adapter": {"type": "lora", "rank": 4}, "model": {"path": str(tmp_path / "runs" / "base")}}
    train(base)
    whole = train(recipe_for(tmp_path, name="whole", **shared, **tuned, train={"max_steps": 4, **numbers}))
    train(recipe_for(tmp_path, name="halves", **shared, **tuned, train={"max_steps": 2, **numbers}))
    train({**base, "train": {**base["train"], "max_steps": 4}})
    halves = train(recipe_for(tmp_path, name="halves", **shared, **tuned, train={"max_steps": 4, **numbers}))
    assert halves.losses == whole.losses
    config = json.loads((halves.checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "runs" / "base" / "step-000002.a1")


def test_every_rank_has_a_place_of_its_own_for_the_models_small_files(tmp_path):
    """Ranks of other hosts do not see rank 0's temporary folder."""
    recipe = Recipe.model_validate(recipe_for(tmp_path))

    def place(rank: int, size: int, rendezvous: Path) -> tuple[str, str]:
        group = groups.start(World(rank=rank, size=size), f"file://{rendezvous}")
        try:
            attempt = Attempt(RunDirectory(str(tmp_path)), 1, 1, utc_now(), None)
            folder = entry._find_folder(recipe, attempt, group)
            return folder.url, folder._temporary.name
        finally:
            groups.stop()

    (url, one), (same_url, other) = run_distributed(place, 2, tmp_path / "rendezvous", connect=False)
    assert url == same_url
    assert one != other


def test_out_of_memory_on_one_rank_is_the_users_to_mend(tmp_path, monkeypatch):
    on_device = loop.on_device
    shared = {"evaluate": {"at_start": False}}

    def full(batch: Any, device: str) -> Any:
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return on_device(batch, device)

    monkeypatch.setattr(loop, "on_device", full)
    with pytest.raises(RanksFailed, match=r"(?s)RankError: step 1: rank 1 is out of GPU memory.*micro_batch_size"):
        train(recipe_for(tmp_path, **shared), 2)


def alone_in_a_folder(rank: int, size: int, recipe: Any, store: str, folders: list[str]) -> None:
    os.chdir(folders[rank])
    loaded = LoadedRecipe(Recipe.model_validate(recipe), "test.yaml", (), ())
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    entry.run_rank(entry.Job(loaded, world, f"file://{store}", QuietMonitor(), ("test",)))


def test_a_run_directory_that_nodes_do_not_share(tmp_path):
    """A relative path means another folder on each node."""
    recipe = recipe_for(tmp_path, checkpoint={"path": "runs"})
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(RanksFailed, match=r"UserError: .*checkpoint.path: runs/tiny on .*not the folder that rank 0"):
        run_distributed(alone_in_a_folder, 2, recipe, str(tmp_path / "store"), list(map(str, folders)), connect=False)
