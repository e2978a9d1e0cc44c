"""What a run leaves behind opens in the libraries that everybody uses, and says what the engine says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from logits import engine_logits, logits
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import make_model, recipe_for
from training import train
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

LOGIT_TOLERANCE = 1e-5
"""Absolute, of logits around 1, in fp32: the same kernels on the same weights, sharded or merged differently."""

SIZE = 2


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"every_steps": None},
        "train": {"max_steps": 3, "learning_rate": 1e-2},
    }
    return recipe_for(folder, **shared | changes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_checkpoint_is_a_transformers_model(tmp_path, tied, dtype):
    make_model(tmp_path / "start", tie_word_embeddings=tied)
    answering = {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 2], "pad_token_id": 0}
    GenerationConfig(**answering).save_pretrained(tmp_path / "start")
    settings = recipe(tmp_path, model={"path": str(tmp_path / "start"), "dtype": dtype})
    run = train(settings, SIZE)
    model, report = AutoModelForCausalLM.from_pretrained(run.checkpoint, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == getattr(torch, dtype)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.use_cache
    # bf16: the engine computes with the very same rounded weights, and both round activations.
    tolerance = LOGIT_TOLERANCE if dtype == "float32" else 2e-2
    torch.testing.assert_close(logits(model), engine_logits(settings, run), rtol=0, atol=tolerance)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    assert (logits(start) - logits(model)).abs().max() > 10 * tolerance
    assert {name: getattr(model.generation_config, name) for name in answering} == answering
    tokenizer = AutoTokenizer.from_pretrained(run.checkpoint)
    assert tokenizer.chat_template and tokenizer("alpha beta")["input_ids"]


@pytest.mark.parametrize("modules_to_save", [[], ["lm_head"], ["lm_head", "embed_tokens"]])
def test_an_adapter_is_a_peft_adapter(tmp_path, modules_to_save):
    adapter = {"type": "lora", "rank": 4, "alpha": 8, "modules_to_save": modules_to_save}
    settings = recipe(tmp_path, adapter=adapter)
    run = train(settings, SIZE)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = logits(base)
    model = PeftModel.from_pretrained(base, run.checkpoint)
    after = logits(model)
    torch.testing.assert_close(after, engine_logits(settings, run), rtol=0, atol=LOGIT_TOLERANCE)
    assert (after - before).abs().max() > 10 * LOGIT_TOLERANCE
    stored = load_file(run.checkpoint / "adapter_model.safetensors")
    assert stored.keys() == set(saved_names(model))
    assert all(values.any() for values in stored.values())
    config = json.loads((run.checkpoint / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["base_model_name_or_path"]
    merged = logits(model.merge_and_unload())
    torch.testing.assert_close(merged, after, rtol=0, atol=LOGIT_TOLERANCE)


def saved_names(model: PeftModel) -> list[str]:
    """What peft itself would save."""
    from peft import get_peft_model_state_dict

    return list(get_peft_model_state_dict(model, save_embedding_layers=False))


def test_an_adapter_over_a_tied_model(tmp_path):
    make_model(tmp_path / "start", tie_word_embeddings=True)
    settings = recipe(tmp_path, model={"path": str(tmp_path / "start")}, adapter={"type": "lora", "rank": 4})
    run = train(settings, SIZE)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "start"), run.checkpoint)
    torch.testing.assert_close(logits(model), engine_logits(settings, run), rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["embed_tokens", "o_proj"]])
def test_chosen_modules(tmp_path, target_modules):
    """Suffixes of module names; an embedding has another pair of tensors."""
    settings = recipe(tmp_path, adapter={"type": "lora", "rank": 3, "target_modules": target_modules})
    run = train(settings, SIZE)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), run.checkpoint)
    torch.testing.assert_close(logits(model), engine_logits(settings, run), rtol=0, atol=LOGIT_TOLERANCE)
    stored = load_file(run.checkpoint / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in stored} == set(target_modules)
    assert stored.keys() == set(saved_names(model)), "other readers look for peft's names"


def test_tensorboard_shows_a_run_that_asks_for_nothing(tmp_path):
    """Without `track:` in the recipe: every number of every step, and every evaluation."""
    settings = recipe(tmp_path, evaluate={"at_start": True, "at_end": True})
    del settings["track"]
    run = train(settings, SIZE)
    events = EventAccumulator(str(run.directory / "tensorboard")).Reload()
    kinds = {"step": "train/", "evaluation": "eval/"}
    wanted: dict[str, list[tuple[int, float]]] = {}
    for line in run.lines:
        values = line["losses"] if line["kind"] == "evaluation" else line
        for name in values.keys() - {"kind", "step", "attempt", "time"} if line["kind"] in kinds else ():
            wanted.setdefault(kinds[line["kind"]] + name, []).append((line["step"], values[name]))
    assert {"train/loss", "train/learning_rate", "eval/chats/loss"} <= wanted.keys()
    assert set(events.Tags()["scalars"]) == wanted.keys()
    for name, values in wanted.items():
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], name  # float32
