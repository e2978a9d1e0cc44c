"""`strategy: {type: auto}` on ranks, and what they say when memory does not suffice."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RanksFailed
from tiny import recipe_for
from training import Trained, train, train_all

from ftlaunch.distributed import entry, loop
from ftlaunch.distributed.choosing import poorest
from ftlaunch.distributed.estimate.memory import estimate
from ftlaunch.distributed.estimate.setting import Room, Setting
from ftlaunch.distributed.memory import within_memory
from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.outline import outline_of
from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import RankError
from ftlaunch.recipes.schema import Recipe

PLAIN: dict[str, Any] = {"evaluate": {"at_start": False}, "checkpoint": {"every_steps": None}}


def takes(recipe: dict[str, Any], strategy: str, ranks: int) -> int:
    """The estimate for a rank, bytes."""
    typed = Recipe.model_validate({**recipe, "strategy": {"type": strategy}})
    folder = find_model(typed.model.path)
    outline = outline_of(build_model(typed, folder), folder.config)
    assert outline is not None
    return estimate(typed, outline, Setting(ranks, 1, "cpu")).total


def messages(run: Trained) -> list[str]:
    """What the run said about the strategy, by attempt."""
    events = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    return [e["text"] for e in events if e["event"] == "message" and e["text"].startswith("strategy auto")]


def recorded(run: Trained) -> dict[str, Any]:
    """The strategy that the run wrote down."""
    strategy: dict[str, Any] = json.loads((run.directory / "environment.json").read_text())["strategy"]
    return strategy


def auto(gigabytes: float) -> dict[str, Any]:
    return {"type": "auto", "memory_gb": gigabytes}


def test_auto_trains_as_the_strategy_that_it_chose(tmp_path):
    """To the bit: it is the same program from then on."""

    def one(name: str, strategy: dict[str, Any]) -> dict[str, Any]:
        return recipe_for(tmp_path, name=name, strategy=strategy, train={"max_steps": 3}, **PLAIN)

    fits = one("wide", auto(100.0))
    tight = one("tight", auto((takes(fits, "ddp", 2) - 1) / 0.85e9))
    named = [one("ddp", {"type": "ddp"}), one("fsdp", {"type": "fsdp"})]
    wide, narrow, ddp, fsdp = train_all([fits, tight, *named], 2)
    assert (recorded(wide)["type"], recorded(narrow)["type"]) == ("ddp", "fsdp")
    assert wide.losses == ddp.losses
    assert narrow.losses == fsdp.losses
    assert wide.grad_norms == ddp.grad_norms
    assert len(messages(wide)) == len(messages(narrow)) == 1
    assert "strategy auto: ddp: the whole model fits on every rank" in messages(wide)[0]
    assert "ddp would take" in messages(narrow)[0]
    assert messages(ddp) == []
    assert recorded(ddp)["type"] == "ddp"


def test_a_run_may_go_on_under_another_strategy_at_another_world_size_and_says_so(tmp_path):
    """Two ranks share what one alone can hold: with other ranks there are copies besides."""

    def part(steps: int, ranks: int) -> Trained:
        shared = {"train": {"max_steps": steps, "lr_scheduler": "constant"}, **PLAIN}
        probe = recipe_for(tmp_path, **shared)
        between = (takes(probe, "ddp", 1) + takes(probe, "ddp", 2)) / 2
        return train(recipe_for(tmp_path, name="parts", strategy=auto(between / 0.85e9), **shared), ranks)

    assert recorded(part(2, 2))["type"] == "fsdp"
    run = part(4, 1)
    assert recorded(run)["type"] == "ddp"
    assert messages(run)[0].startswith("strategy auto: fsdp")
    assert messages(run)[1].startswith("strategy auto: ddp")
    assert messages(run)[1].endswith("the attempt before ran under fsdp, and checkpoints are the same")
    whole = recipe_for(tmp_path, name="whole", train={"max_steps": 4, "lr_scheduler": "constant"}, **PLAIN)
    assert run.losses == pytest.approx(train(whole, 1).losses, rel=2e-5)  # fp32, sums in another order


def test_ranks_take_what_the_poorest_of_them_has():
    rooms = [Room(30, 9, True), Room(20, 10, False)]
    assert poorest(rooms) == Room(20, 9, False)


def test_a_rank_out_of_memory_says_what_takes_it_and_what_to_change(tmp_path, monkeypatch):
    on_device = loop.on_device

    def full(batch: Any, device: str) -> Any:
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return on_device(batch, device)

    monkeypatch.setattr(loop, "on_device", full)
    recipe = recipe_for(tmp_path, strategy={"type": "ddp"}, **PLAIN)
    with pytest.raises(RanksFailed) as failed:
        train(recipe, 2)
    said = str(failed.value)
    assert "step 1: rank 1 is out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB.\n" in said
    now, half = (
        takes(recipe, "ddp", 2),
        takes({**recipe, "train": {**recipe["train"], "micro_batch_size": 1}}, "ddp", 2),
    )
    assert half < now
    assert f"By the estimate a rank takes {now / 2**10:.1f} KiB" in said or f"{now / 2**20:.1f} MiB" in said
    assert "most of it " in said
    assert "train.micro_batch_size: 1: " in said
    assert "train.activation_checkpointing: true: " in said
    assert "strategy: {type: fsdp}: " in said


def test_a_host_without_memory_is_told_in_the_same_way():
    with (
        pytest.raises(RankError, match=r"(?s)here: rank 3 is out of memory: .*can't allocate memory.*\nDo less\."),
        within_memory(World(rank=3, size=4), "here", lambda: "Do less."),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="connection lost"), within_memory(World(), "here", lambda: ""):
        raise RuntimeError("connection lost")


def test_under_torchrun_the_rank_that_is_out_of_memory_speaks(tmp_path, monkeypatch, capsys):
    """Others only wait for it. A mistake that all of them see is told by rank 0."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_for(tmp_path)))

    def fail(job: Any) -> str:
        raise RankError("step 1: rank 1 is out of GPU memory")

    monkeypatch.setattr(entry, "run_rank", fail)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert entry.main([str(path)]) == 1
    assert "rank 1 is out of GPU memory" in capsys.readouterr().err
