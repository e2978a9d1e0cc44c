"""What `plan` says a rank takes, against what CUDA's allocator hands out; benchmarks/plan_memory.py does it on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_rank import CUDA, train_on
from tiny import make_model, recipe_for

from ftlaunch.distributed import entry
from ftlaunch.distributed.estimate.memory import estimate
from ftlaunch.distributed.estimate.setting import Setting
from ftlaunch.distributed.loop import Run, train
from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.outline import outline_of
from ftlaunch.recipes.schema import Recipe

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
WITHIN = (0.85, 1.2)
"""Measured / planned. What is not tensors of ours (cuBLAS's workspaces of some 10 MiB, blocks rounded to 512 bytes) is
in the allocator's figures."""


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    recipe = recipe_for(folder, evaluate={"at_start": False}, checkpoint={"every_steps": None, "mode": "sync"})
    if not (folder / "wide").exists():
        make_model(folder / "wide", **SIZES)
    recipe["model"] = {"path": str(folder / "wide"), "dtype": "bfloat16"}
    recipe["data"]["sequence_length"] = 2048
    recipe["train"] |= {"max_steps": 3, "global_batch_size": 8, "micro_batch_size": 4}
    return recipe | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": {"type": "ddp"}},
        {"strategy": {"type": "fsdp"}},
        {"adapter": {"type": "lora", "rank": 16}},
        {"recomputed": True},
    ],
    ids=str,
)
def test_the_estimate_is_what_a_run_takes(tmp_path, monkeypatch, changes):
    recipe = settings(tmp_path, **{key: value for key, value in changes.items() if key != "recomputed"})
    recipe["train"]["activation_checkpointing"] = changes.get("recomputed", False)
    peaks: list[int] = []

    def measured(run: Run) -> str:
        torch.cuda.reset_peak_memory_stats()
        outcome = train(run)
        peaks.append(torch.cuda.max_memory_allocated())
        return outcome

    monkeypatch.setattr(entry, "train", measured)
    before = torch.cuda.memory_allocated()
    train_on(CUDA, recipe)
    typed = Recipe.model_validate(recipe)
    folder = find_model(typed.model.path)
    outline = outline_of(build_model(typed, folder), folder.config)
    assert outline is not None
    planned = estimate(typed, outline, Setting(1, 1, "cuda"))
    assert WITHIN[0] <= (peaks[0] - before) / planned.total <= WITHIN[1], planned
