"""What a run starts from is the same model at every world size, bit for bit."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes long: once, before the ranks are forked
import numpy as np
import pytest
import torch
from harness import run_distributed
from one_rank import Rank
from tiny import recipe_for
from training import STRATEGIES, train_all
from transformers import AutoModelForCausalLM

from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe

Pieces = list[tuple[str, int, int, np.ndarray]]


def pieces_of(rank: int, size: int, recipe: dict[str, Any]) -> Pieces:
    """(tensor, begin, end, values) of everything that this rank holds of the published model."""
    built = Rank.build(recipe, World(rank=rank, size=size, local_rank=rank, local_size=size))
    return [
        (fragment.spec.name, start, stop, fragment.values.float().numpy().copy())
        for fragment in built.engine.fragments("model")
        for start, stop in fragment.ranges
    ]


def assembled(ranks: list[Pieces]) -> dict[str, np.ndarray]:
    """Whole tensors; ranks that hold the same part must agree."""
    sizes: dict[str, int] = {}
    for name, _, stop, _ in (piece for pieces in ranks for piece in pieces):
        sizes[name] = max(stop, sizes.get(name, 0))
    whole = {name: np.full(size, np.nan, dtype=np.float32) for name, size in sizes.items()}
    for name, start, stop, values in (piece for pieces in ranks for piece in pieces):
        there = whole[name][start:stop]
        assert np.isnan(there).all() or np.array_equal(there, values), name
        there[:] = values
    return whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [None, {"type": "lora", "rank": 4, "modules_to_save": ["lm_head"]}])
def test_the_same_model_at_every_world_size(tmp_path, adapter, dtype):
    """A random model; with an adapter: its tensors, over a pretrained one."""
    changes = {"model": {"init": "random" if adapter is None else "pretrained", "dtype": dtype}, "adapter": adapter}
    reference: dict[str, np.ndarray] = {}
    for size, strategy in [(1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (3, "ddp"), (2, "zero2"), (3, "zero3")]:
        recipe = recipe_for(tmp_path, strategy=STRATEGIES[strategy], **changes)
        whole = assembled(run_distributed(pieces_of, size, recipe))
        reference = reference or whole
        assert whole.keys() == reference.keys()
        for name, values in whole.items():
            assert not np.isnan(values).any(), name
            assert np.array_equal(values, reference[name]), f"{name} at {size} ranks, {strategy}"
    spreads = {name: values.std() for name, values in reference.items()}
    assert sum(spread > 0 for spread in spreads.values()) >= len(spreads) // 3


def test_a_model_in_several_files_trains_alike(tmp_path):
    """As `save_pretrained` splits it: with an index, in files that end between tensors."""
    base = AutoModelForCausalLM.from_pretrained(recipe_for(tmp_path)["model"]["path"])
    base.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    for file in (tmp_path / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "sharded")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    short = {"train": {"max_steps": 3}, "checkpoint": {"every_steps": None}}
    recipes = [
        recipe_for(tmp_path, name=name, model={"path": str(tmp_path / name)}, **short) for name in ("model", "sharded")
    ]
    whole, sharded = train_all(recipes, 2)
    assert sharded.losses == whole.losses and len(whole.losses) == 3
    assert sharded.grad_norms == whole.grad_norms
    assert all(torch.equal(sharded.tensors[name], value) for name, value in whole.tensors.items())


def test_flash_attention_that_is_not_installed(tmp_path, monkeypatch):
    recipe = Recipe.model_validate(recipe_for(tmp_path, model={"attention": "flash_attention_2"}))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match=r"model\.attention: FlashAttention2 .*pip install flash-attn"):
        build_model(recipe, find_model(recipe.model.path))
