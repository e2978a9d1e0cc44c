"""Whole runs on a GPU: the CPU's numbers in float32, and in bfloat16 checkpoints, resuming, adapters, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_rank import CUDA, train_on
from safetensors.torch import load_file
from tiny import make_model, recipe_for
from training import Trained
from transformers import AutoModelForCausalLM

from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import UserError

CPU_TOLERANCE = 1e-5
"""Relative, float32 without TF32: other kernels add in another order, some 2^-24 a sum, over eight steps."""

BF16_TOLERANCE = 1e-2
"""Relative, of losses: activations are rounded to 2^-8, and a loss is a mean over some hundred tokens."""

PLAIN: dict[str, Any] = {"checkpoint": {"every_steps": None}, "evaluate": {"at_start": False}}


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    if not (folder / "model").exists():
        recipe_for(folder)
        make_model(folder / "gpu-model", hidden_size=128, intermediate_size=192)  # heads of 32
    recipe = recipe_for(folder, name=name, **PLAIN | changes)
    recipe["checkpoint"]["path"] = str(folder / "runs")
    recipe["model"] = {"path": str(folder / "gpu-model"), "dtype": "bfloat16", **changes.get("model", {})}
    return recipe


def assert_near(one: Trained, other: Trained, tolerance: float) -> None:
    assert len(one.losses) == len(other.losses) > 0
    assert one.losses == pytest.approx(other.losses, rel=tolerance)
    assert one.losses[-1] < one.losses[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_float32_has_the_losses_of_the_cpu(tmp_path, strategy):
    shared = {"model": {"dtype": "float32"}, "strategy": {"type": strategy}}
    cpu = train_on(World(), settings(tmp_path, "cpu", **shared))
    assert_near(train_on(CUDA, settings(tmp_path, "gpu", **shared)), cpu, CPU_TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": {"type": "ddp"}},
        {"train": {"activation_checkpointing": True}},
        {"train": {"compile": True}},
        {"train": {"micro_batch_size": 8}},
        {"model": {"attention": "sdpa"}},
        {"model": {"attention": "eager"}},
    ],
    ids=str,
)
def test_bfloat16_learns_the_same_by_every_way(tmp_path, changes):
    """Against float32 on the same device; attention is torch's variable-length one unless the recipe says otherwise."""
    reference = train_on(CUDA, settings(tmp_path, "reference", model={"dtype": "float32"}))
    assert_near(train_on(CUDA, settings(tmp_path, "run", **changes)), reference, BF16_TOLERANCE)


def test_a_checkpoint_opens_in_transformers_with_master_weights_beside_it(tmp_path):
    run = train_on(CUDA, settings(tmp_path, "run"))
    model = AutoModelForCausalLM.from_pretrained(run.checkpoint)
    assert model.dtype == torch.bfloat16
    assert "varlen" not in (run.checkpoint / "config.json").read_text()  # which nobody else knows
    masters = load_file(next((run.checkpoint / "training").glob("master*")))
    name, master = next(iter(masters.items()))
    assert master.dtype == torch.float32
    assert torch.equal(model.state_dict()[name], master.bfloat16())


@pytest.mark.parametrize(
    "changes", [{}, {"adapter": {"type": "lora", "rank": 4, "dropout": 0.1}}], ids=["full", "lora"]
)
def test_resumed_bit_for_bit(tmp_path, changes):
    """With `train.deterministic`: a run in two parts has the losses and weights of one."""

    def part(name: str, steps: int) -> Trained:
        train = {"max_steps": steps, "deterministic": True, "lr_scheduler": "constant"}
        return train_on(CUDA, settings(tmp_path, name, train=train, **changes))

    whole = part("whole", 8)
    part("parts", 3)
    parts = part("parts", 8)
    assert parts.losses == whole.losses
    for file in whole.checkpoint.glob("*.safetensors"):
        one, other = load_file(file), load_file(parts.checkpoint / file.name)
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_out_of_memory_says_what_to_change(tmp_path):
    recipe = settings(tmp_path, "big", train={"micro_batch_size": 8, "max_steps": 1})
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(UserError, match=r"(?s)rank 0 is out of GPU memory.*By the estimate a rank takes"):
            train_on(CUDA, recipe)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
