"""A checkpoint of every strategy opens in the libraries that everybody uses, and says what the live model said."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes long: once, before the ranks are forked
import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the ranks are forked
from harness import run_distributed
from logits import logits, probe_batch
from peft import PeftModel
from tiny import make_model, recipe_for
from training import NODES, STRATEGIES, QuietMonitor, Trained, read_run, world_of
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import entry
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

OFFLOAD = {"type": "fsdp", "offload": "cpu"}

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Absolute, of logits around 1: the same kernels on the same weights; in bfloat16 the engine computes with the very
same rounded weights, and both round activations."""


def recipe(folder: Path, strategy: str, kind: str) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "name": f"{strategy}-{kind}",
        "strategy": {**STRATEGIES, "fsdp-offload": OFFLOAD}[strategy],
        "train": {"max_steps": 2, "learning_rate": 1e-2, "lr_scheduler": "constant"},
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"every_steps": None},
        **({"adapter": {"type": "lora", "rank": 4, "alpha": 8}} if "lora" in kind else {}),
    }
    dtype = "bfloat16" if "bf16" in kind else "float32"
    path = folder / "tied" if "tied" in kind else folder / "model"
    return recipe_for(folder, model={"path": str(path), "dtype": dtype}, **changes)


def live_logits(rank: int, size: int, recipes: list[dict[str, Any]], folder: str) -> list[Any]:
    """Train each, and ask the model as it is when the last step is done."""
    answers = []
    train = entry.train

    def train_and_ask(run: Any) -> str:
        outcome = train(run)
        run.engine.module.eval()
        with torch.no_grad():
            answers.append(run.engine.module(probe_batch(), "own_logits").float().numpy().copy())
        return outcome

    entry.train = train_and_ask
    world = world_of(rank, NODES[size])
    for number, settings in enumerate(recipes):
        loaded = LoadedRecipe(Recipe.model_validate(settings), "test.yaml", (), ())
        entry.run_rank(entry.Job(loaded, world, f"file://{folder}/{number}", QuietMonitor(), ("test",)))
    return answers if rank == 0 else []


def check_all(folder: Path, matrix: list[tuple[str, str]], size: int) -> None:
    recipe_for(folder)
    make_model(folder / "tied", tie_word_embeddings=True)
    recipes = [recipe(folder, *one) for one in matrix]
    answers = run_distributed(live_logits, size, recipes, str(folder), connect=False, timeout_s=3000)[0]
    for settings, answer in zip(recipes, answers, strict=True):
        run = read_run(Path(settings["checkpoint"]["path"]) / settings["name"])
        plain, start = opened(settings, run)
        tolerance = TOLERANCE[settings["model"]["dtype"]]
        torch.testing.assert_close(plain, torch.from_numpy(answer), rtol=0, atol=tolerance, msg=settings["name"])
        assert (plain - start).abs().max() > 5 * tolerance, f"{settings['name']} has learned something"


def opened(settings: dict[str, Any], run: Trained) -> tuple[torch.Tensor, torch.Tensor]:
    """What the checkpoint says, opened as anybody would, and what the model said that it began as."""
    base = AutoModelForCausalLM.from_pretrained(settings["model"]["path"])
    start = logits(base)
    if "adapter" in settings:
        return logits(PeftModel.from_pretrained(base, run.checkpoint)), start
    model, report = AutoModelForCausalLM.from_pretrained(run.checkpoint, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), settings["name"]
    assert model.dtype == getattr(torch, settings["model"]["dtype"])
    return logits(model), start


def test_every_strategy_in_full_and_with_an_adapter(tmp_path):
    """Embeddings tied to the head, and bfloat16, with every other strategy each."""
    kinds = (("full", "lora-tied"), ("full-tied-bf16", "lora"))
    check_all(tmp_path, [(name, kind) for place, name in enumerate(STRATEGIES) for kind in kinds[place % 2]], 2)


@pytest.mark.evidence
def test_every_kind_of_checkpoint_opens(tmp_path):
    kinds = ("full", "lora", "full-tied", "lora-tied", "full-bf16", "lora-bf16", "full-tied-bf16", "lora-tied-bf16")
    check_all(tmp_path, list(itertools.product([*STRATEGIES, "fsdp-offload"], kinds)), 4)
