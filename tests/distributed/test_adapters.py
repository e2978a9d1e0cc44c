"""LoRA's variants on several ranks: the same start and losses at every world size, and what is saved is a plain adapter
on the model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes long: once, before the ranks are forked
import pytest
import torch
from families import random_recipe
from logits import engine_logits, logits
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model, recipe_for
from training import STRATEGIES, Trained, train, train_all
from transformers import AutoModelForCausalLM

from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import find_model
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe

LOSS_TOLERANCE = 1e-5
"""Relative, as for every layout (`test_training_layout.py`)."""

LOGIT_TOLERANCE = 1e-5
"""Absolute, of logits around 1, in fp32: the same kernels on the same weights, sharded or merged differently."""

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora_gaussian": {"use_rslora": True, "init": "gaussian", "modules_to_save": ["lm_head"]},
    "pissa": {"init": "pissa_niter_4", "target_modules": r".*\.(q|k|v|o)_proj"},
    "olora_dora_rslora": {"init": "olora", "use_dora": True, "use_rslora": True, "modules_to_save": ["embed_tokens"]},
}


def recipe(folder: Path, name: str, adapter: dict[str, Any], **changes: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "name": name,
        "adapter": {"type": "lora", "rank": 3, "alpha": 6, **adapter},
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"every_steps": None},
        "train": {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler": "constant"},
    }
    return recipe_for(folder, **shared | changes)


def opened(folder: Path, run: Trained) -> PeftModel:
    """As anybody opens it: the base as it was, and the adapter."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), run.checkpoint)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], Trained]]:
    """Every variant at worlds of 1 and 3, the latter under ddp too."""
    folder = tmp_path_factory.mktemp("variants")
    recipe_for(folder)
    runs: dict[tuple[str, int], Trained] = {}
    for size in (1, 3):
        settings = [recipe(folder, f"{name}-{size}", adapter) for name, adapter in VARIANTS.items()]
        runs |= {(name, size): run for name, run in zip(VARIANTS, train_all(settings, size), strict=True)}
    ddp = [recipe(folder, f"{name}-ddp", adapter, strategy={"type": "ddp"}) for name, adapter in VARIANTS.items()]
    return folder, runs | {(f"{name}-ddp", 2): run for name, run in zip(VARIANTS, train_all(ddp, 2), strict=True)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_does_not_depend_on_the_layout(trained, variant):
    _, runs = trained
    alone, three, ddp = runs[variant, 1], runs[variant, 3], runs[f"{variant}-ddp", 2]
    assert three.losses == pytest.approx(alone.losses, rel=LOSS_TOLERANCE)
    assert ddp.losses == pytest.approx(alone.losses, rel=LOSS_TOLERANCE)
    assert alone.losses[-1] < alone.losses[0] and len(set(alone.losses)) == 4


@pytest.mark.parametrize(
    ("strategy", "variant"),
    [("zero2", "dora"), ("zero3", "rslora_gaussian"), ("zero2", "pissa"), ("zero3", "pissa")],
)
def test_deepspeed_learns_the_same(trained, strategy, variant):
    """Starts are filled and halves stay frozen in flat partitions too; what is saved opens as well."""
    folder, runs = trained
    settings = recipe(folder, f"{variant}-{strategy}", VARIANTS[variant], strategy=STRATEGIES[strategy])
    run = train(settings, 2)
    assert run.losses == pytest.approx(runs[variant, 1].losses, rel=LOSS_TOLERANCE)
    ours, theirs = logits(opened(folder, run)), logits(opened(folder, runs[variant, 1]))
    # AdamW turns rounding of gradients near zero into changes of weights.
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_a_plain_adapter(trained, variant):
    """Opened by peft on the model as it was it says what the engine says; merged too; and every tensor is used."""
    folder, runs = trained
    run = runs[variant, 3]
    model = opened(folder, run)
    answer = logits(model)
    live = engine_logits(recipe(folder, "live", VARIANTS[variant]), run)
    torch.testing.assert_close(answer, live, rtol=0, atol=LOGIT_TOLERANCE)
    base = logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
    assert (answer - base).abs().max() > 100 * LOGIT_TOLERANCE
    stored = load_file(run.checkpoint / "adapter_model.safetensors")
    loaded = {
        name.replace(".default", "") for name, p in model.named_parameters() if ".lora_" in name or "to_save" in name
    }
    named = {
        name.replace("modules_to_save.", "").replace("magnitude_vector.weight", "magnitude_vector") for name in loaded
    }
    assert stored.keys() == named
    torch.testing.assert_close(logits(model.merge_and_unload()), answer, rtol=0, atol=LOGIT_TOLERANCE)


def test_the_start_stays_beside_what_is_trained(trained):
    """Of twice the rank, where one half is the start with its sign turned: untouched, and equal for every world."""
    folder, runs = trained
    starts = []
    for size in (1, 3):
        stored = load_file(runs["pissa", size].checkpoint / "adapter_model.safetensors")
        config = json.loads((runs["pissa", size].checkpoint / "adapter_config.json").read_text())
        assert config["r"] == 6 and config["lora_alpha"] == 12 and config["init_lora_weights"] is True
        starts.append({n: v[3:] if "lora_A" in n else v[:, 3:] for n, v in stored.items()})
        trained_half = {n: v[:3] if "lora_A" in n else -v[:, :3] for n, v in stored.items()}
        assert all(not torch.equal(trained_half[name], starts[-1][name]) for name in stored)
    [once] = train_all([recipe(folder, "once", VARIANTS["pissa"], train={"max_steps": 1, "learning_rate": 1e-30})])
    drawn = load_file(once.checkpoint / "adapter_model.safetensors")
    for name, start in starts[0].items():
        assert torch.equal(start, starts[1][name])
        assert torch.equal(start, drawn[name][3:] if "lora_A" in name else drawn[name][:, 3:])


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_a_run_goes_on(trained, variant):
    """On another number of ranks, without a new start."""
    folder, runs = trained
    settings = recipe(folder, f"{variant}-moved", VARIANTS[variant])
    train({**settings, "train": {**settings["train"], "max_steps": 2}}, 2)
    moved = train(settings, 1)
    assert moved.losses == pytest.approx(runs[variant, 1].losses, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_in_bfloat16(trained, variant):
    """Both round activations; the weights are the very same."""
    folder, _ = trained
    settings = recipe(folder, f"{variant}-bf16", VARIANTS[variant], model={"dtype": "bfloat16"})
    run = train(settings, 2)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, run.checkpoint, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(model), engine_logits(settings, run), rtol=0, atol=2e-2)
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "no module is called v_prj. Names look like .*q_proj"),
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save: no module is called lm_hed"),
        ({"modules_to_save": ["lm_head.weight"]}, r"no module is called lm_head.weight. Names look like [^.]*\.$"),
        ({"target_modules": r"transformer\..*"}, "not found in the base model"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "embed_tokens is an embedding, which use_dora: true"),
        ({"target_modules": ["embed_tokens"], "init": "olora"}, "embed_tokens is an embedding, which init: olora"),
        ({"rank": 21, "init": "pissa"}, "k_proj has 20 singular vectors"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, adapter, words):
    folder = make_model(tmp_path / "model")
    typed = Recipe.model_validate(
        {
            "name": "refused",
            "model": {"path": str(folder)},
            "data": {"train": [{"path": "nowhere.jsonl"}]},
            "adapter": {"type": "lora", **adapter},
        }
    )
    with pytest.raises(UserError, match=words):
        build_model(typed, find_model(str(folder)))


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["down_proj"]])
def test_experts_that_are_one_tensor_are_named(tmp_path, targets):
    """Adapters elsewhere are told of experts by such names; here they are no modules."""
    settings = random_recipe(tmp_path, "qwen3_moe", adapter={"type": "lora", "target_modules": targets})
    typed = Recipe.model_validate(settings)
    with pytest.raises(UserError, match=r"down_proj holds the weights of all experts of a layer, .* leave it out"):
        build_model(typed, find_model(typed.model.path))
