"""Models that would be trained on other numbers than their files hold, or not at all, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RanksFailed
from one_rank import alone
from safetensors.torch import load_file, save_file
from tiny import chat_rows, make_model, make_tokenizer, write_jsonl
from training import train

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


def gemma4(folder: Path) -> Path:
    """A tiny Gemma 4, which keeps a learned scale of each layer in a buffer."""
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM

    config = Gemma4TextConfig(
        vocab_size=307,
        vocab_size_per_layer_input=307,
        hidden_size=40,
        hidden_size_per_layer_input=8,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=0,
        head_dim=12,
        global_head_dim=12,
        layer_types=["sliding_attention", "full_attention"],
    )
    Gemma4ForCausalLM(config).save_pretrained(make_tokenizer(folder))
    return folder


def test_learned_values_in_buffers_are_refused(tmp_path):
    folder = gemma4(tmp_path / "model")
    check(folder)  # as the model's own initialisation has them: nothing is lost
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.layer_scalar"] = torch.tensor([0.5])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"buffers:\n    model.layers.1.layer_scalar$"):
        check(folder)


def check(folder: Path) -> None:
    """What is looked at before weights are read."""
    found = find_model(str(folder))
    with alone():
        built = build_model(recipe(folder), found)
        prepare(built, recipe(folder), World())
        check_base(built, CheckpointReader(found.url))


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
