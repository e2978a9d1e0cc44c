"""Models that would be trained on other numbers than their files hold, or not at all, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_family
from harness import RanksFailed
from one_rank import Rank, alone
from safetensors.torch import load_file, save_file
from tiny import chat_rows, make_model, write_jsonl
from training import train
from transformers import AutoModelForCausalLM
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextDecoderLayer

from ftlaunch.distributed.checkpoint.reader import CheckpointReader
from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.probes import check_positions
from ftlaunch.distributed.strategies.table import prepare
from ftlaunch.distributed.weights import check_base
from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe


def recipe(folder: Path, **changes: Any) -> Recipe:
    """A recipe that is only used for its model."""
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": [{"path": "nowhere.jsonl"}]},
            **changes,
        }
    )


def test_quantised_weights_are_refused(tmp_path):
    """FP8 weights have the shapes of the model; their scales would have been left out as unused."""
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised \(quantization_config: fp8\)"):
        build_model(recipe(folder), find_model(str(folder)))


@pytest.mark.parametrize("key", ["modules_to_save", "target_modules"])
def test_a_head_that_is_the_embeddings_is_not_adapted_by_itself(tmp_path, key):
    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    adapter = {"type": "lora", key: ["lm_head"]}
    with pytest.raises(UserError, match="head is its embeddings"):
        build_model(recipe(folder, adapter=adapter), find_model(str(folder)))


@pytest.fixture
def gemma4(tmp_path: Path) -> Path:
    """A tiny Gemma 4, which keeps a learned scale of each layer in a buffer."""
    return make_family(tmp_path / "gemma4_text", "gemma4_text")


def check(folder: Path) -> list[str]:
    """What is looked at before weights are read."""
    found = find_model(str(folder))
    with alone():
        built = build_model(recipe(folder), found)
        prepare(built, recipe(folder), World())
        return check_base(built, CheckpointReader(found.url))


def test_buffers_that_do_not_fit_are_refused_and_missing_ones_said(gemma4):
    assert check(gemma4) == []
    tensors = load_file(gemma4 / "model.safetensors")
    del tensors["model.layers.1.layer_scalar"]
    save_file(tensors, gemma4 / "model.safetensors", {"format": "pt"})
    assert check(gemma4) == ["model.layers.1.layer_scalar"], "as transformers has it, it begins at one"
    tensors["model.layers.0.layer_scalar"] = torch.ones(2)
    save_file(tensors, gemma4 / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers.0.layer_scalar is \(2,\) in the files and \(1,\) in config.json"):
        check(gemma4)


@pytest.mark.parametrize("how", ["in place", "another tensor"])
@pytest.mark.parametrize("strategy", [{"type": "ddp"}, {"type": "deepspeed", "stage": 2}])
def test_buffers_that_a_model_changes_are_refused(gemma4, monkeypatch, strategy, how):
    """As batch normalisation does: each rank would by its own rows. A pass that changes nothing is none of that."""
    settings = recipe(gemma4, strategy=strategy).model_dump()
    forward = Gemma4TextDecoderLayer.forward

    def changing(self: Any, *inputs: Any, **named: Any) -> Any:
        if how == "in place":
            self.layer_scalar.mul_(0.99)
        else:
            self.layer_scalar = self.layer_scalar * 0.99
        return forward(self, *inputs, **named)

    with alone():
        made = Rank.build(settings)
        a_step(made)
        monkeypatch.setattr(Gemma4TextDecoderLayer, "forward", changing)
        with pytest.raises(UserError, match=r"'gemma4_text' change buffers .*\(model.layers.0.layer_scalar, model.lay"):
            a_step(made)


def a_step(made: Rank) -> None:
    batch = {name: torch.arange(16)[None] for name in ("input_ids", "position_ids", "targets")}
    made.engine.backward(made.engine.module(batch).sum(), 16.0, last_micro_batch=True)
    assert made.engine.step() > 0


@pytest.mark.parametrize("family", ["gemma4_text", "glm4_moe", "minimax_m2"])
def test_buffers_have_the_dtypes_that_transformers_opens_them_in(tmp_path, family):
    folder = make_family(tmp_path / family, family)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with alone():
        made = Rank.build(recipe(folder, model={"path": str(folder), "dtype": "bfloat16"}).model_dump())
    expected = {name: value for name, value in plain.named_buffers() if name in plain.state_dict()}
    held = {name.removeprefix("model."): value for name, value in made.engine.module.named_buffers()}
    assert expected
    for name, value in expected.items():
        assert held[name].dtype == value.dtype and torch.equal(held[name], value), name


def test_tokens_that_the_model_does_not_know_end_every_rank_with_the_row(tmp_path):
    """An embedding would raise IndexError on one rank, and on a GPU a device-side assertion."""
    folder = make_model(tmp_path / "model", vocab_size=290)
    rows = write_jsonl(tmp_path / "chat.jsonl", chat_rows(40))
    source = {"path": str(rows), "format": "chat"}
    with pytest.raises(RanksFailed) as caught:
        train(
            {
                "name": "tiny",
                "model": {"path": str(folder), "dtype": "float32"},
                "data": {"train": [source], "sequence_length": 64},
                "train": {"max_steps": 2, "global_batch_size": 4},
                "checkpoint": {"path": str(tmp_path / "runs")},
                "track": {"tensorboard": False},
            },
            2,
        )
    assert "the model knows 290 tokens" in str(caught.value)
    assert "errors.InfrastructureError: " not in str(caught.value)


@pytest.mark.parametrize(("model_type", "refused"), [("llama", False), ("gpt2", True), ("opt", True)])
def test_sequences_beyond_the_models_positions(model_type, refused):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 64}
    config = AutoConfig.for_model(model_type, vocab_size=64, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert check_positions(model, config.max_position_embeddings, 64) is None
    if refused:
        with pytest.raises(UserError, match="above the 64 positions"):
            check_positions(model, config.max_position_embeddings, 65)
    else:
        assert "rope scaling" in (check_positions(model, config.max_position_embeddings, 65) or "")
