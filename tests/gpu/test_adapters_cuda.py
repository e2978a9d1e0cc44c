"""Adapters, optimizers and offload on a GPU have the losses of the CPU, where they are held against their libraries."""

from __future__ import annotations

from typing import Any

import pytest
from cuda_rank import CUDA, train_on
from tiny import make_model, recipe_for

from ftlaunch.distributed.world import World

TOLERANCES = {"adamw_8bit": 1e-3, "muon": 1e-3}
"""Relative, of losses. Their roundings to 8 bits, and to bfloat16, fall otherwise in other kernels."""

EXACT = 1e-5
"""Float32 without TF32: other kernels add in another order."""

CHANGES: dict[str, dict[str, Any]] = {
    "dora": {"adapter": {"type": "lora", "rank": 4, "use_dora": True}},
    "pissa": {"adapter": {"type": "lora", "rank": 4, "init": "pissa"}},
    "qlora": {"adapter": {"type": "qlora", "rank": 4}},
    "offload": {"strategy": {"type": "fsdp", "offload": "cpu"}},
    "qlora-offload": {"adapter": {"type": "qlora", "rank": 4}, "strategy": {"type": "fsdp", "offload": "cpu"}},
    **{name: {"train": {"optimizer": name, "learning_rate": 1e-3}} for name in ("adafactor", "adamw_8bit", "muon")},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHANGES)
def test_float32_has_the_losses_of_the_cpu(tmp_path, name):
    folder = make_model(tmp_path / "gpu-model", hidden_size=128, intermediate_size=192)
    shared = {
        "model": {"path": str(folder), "dtype": "float32"},
        "checkpoint": {"every_steps": None},
        "evaluate": {"at_start": False, "at_end": False},
        **CHANGES[name],
    }
    cpu = train_on(World(), recipe_for(tmp_path, name="cpu", **shared))
    gpu = train_on(CUDA, recipe_for(tmp_path, name="gpu", **shared))
    assert gpu.losses == pytest.approx(cpu.losses, rel=TOLERANCES.get(name, EXACT))
    assert gpu.losses[-1] < gpu.losses[0]
