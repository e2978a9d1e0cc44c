"""Which layouts a self-test compares with which, and the recipes and models that it makes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftlaunch.launcher import selftest_recipe
from ftlaunch.launcher.selftest_layouts import (
    OWN,
    WAYS,
    Layout,
    choose_layouts,
    reference_of,
    same_micro_batches,
    with_references,
)
from ftlaunch.launcher.selftest_model import candidates, describe, dropouts, has_experts
from ftlaunch.launcher.selftest_recipe import laid_out, obstacles, trial_recipe
from ftlaunch.recipes.schema import Recipe
from ftlaunch.recipes.schema_strategy import Fsdp

BASE: dict[str, Any] = {
    "name": "bot",
    "model": {"path": "m", "dtype": "float32"},
    "data": {"train": [{"path": "a.jsonl"}]},
    "train": {"global_batch_size": 16, "micro_batch_size": 4},
}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({**BASE, **sections})


def named(layouts: list[Layout]) -> set[str]:
    return set(map(str, layouts))


def test_every_way_on_all_ranks_and_the_own_one_on_every_number():
    layouts = choose_layouts(recipe(strategy={"type": "deepspeed", "stage": 2}), 4)
    assert {layout.way for layout in layouts if layout.ranks == 4} == set(WAYS)
    assert {layout.ranks for layout in layouts if layout.way == "zero2"} == {1, 2, 3, 4}
    assert {layout.micro_batch_size for layout in layouts if layout.way == "zero2" and layout.ranks == 4} == {1, 4}
    assert all(layout.dtype == "float32" for layout in layouts)
    assert [layout.ranks for layout in layouts] == sorted(layout.ranks for layout in layouts)
    assert len(set(layouts)) == len(layouts)


def test_many_ranks_are_not_all_tried():
    assert {layout.ranks for layout in choose_layouts(recipe(), 16)} == {1, 2, 3, 16}


def test_nodes_have_as_many_ranks_each():
    (hybrid,) = [layout for layout in choose_layouts(recipe(), 3) if layout.way == "hybrid"]
    assert (hybrid.ranks, hybrid.nodes) == (2, 2)
    assert str(hybrid) == "hybrid, 2 ranks on 2 nodes, micro-batch 4, float32"
    alone = [layout for layout in choose_layouts(recipe(), 1) if layout.way == "hybrid"]
    assert [(layout.ranks, layout.nodes) for layout in alone] == [(1, 1)]


def test_a_strategy_of_the_users_own_making_is_tried_as_it_is():
    strategy = {"type": "fsdp", "reshard_after_forward": False, "offload": "cpu"}
    own = [layout for layout in choose_layouts(recipe(strategy=strategy), 2) if layout.way == OWN]
    assert {layout.ranks for layout in own} == {1, 2}
    assert all(layout.strategy == Fsdp(reshard_after_forward=False, offload="cpu") for layout in own)


def test_bfloat16_is_tried_besides():
    layouts = choose_layouts(recipe(model={"path": "m", "dtype": "bfloat16"}), 2)
    assert {layout.way for layout in layouts if layout.dtype == "bfloat16"} == set(WAYS)
    assert {layout.way for layout in layouts if layout.dtype == "float32"} == set(WAYS)


def test_references():
    layouts = choose_layouts(recipe(model={"path": "m", "dtype": "bfloat16"}), 3)
    zero3 = {layout.dtype: layout for layout in layouts if layout.way == "zero3"}
    one = reference_of(zero3["float32"], dropout=False)
    assert str(one) == "fsdp, 1 rank, micro-batch 1, float32"
    assert str(reference_of(zero3["float32"], dropout=True)) == "fsdp, 1 rank, micro-batch 4, float32"
    for dropout in (False, True):
        assert str(reference_of(zero3["bfloat16"], dropout=dropout)) == "fsdp, 3 ranks, micro-batch 4, bfloat16"
        ordered = with_references(layouts, dropout=dropout)
        assert set(layouts) <= set(ordered) and len(set(ordered)) == len(ordered)
        for place, layout in enumerate(ordered):
            reference = reference_of(layout, dropout=dropout)
            assert reference in ordered[: place + 1], layout
            assert reference_of(reference, dropout=dropout) == reference


@pytest.mark.parametrize(
    ("ranks", "size", "streams", "batch", "same"),
    [
        (2, 2, 8, 8, True),
        (4, 2, 8, 8, True),
        (2, 1, 8, 8, True),
        (3, 1, 8, 8, True),
        (3, 2, 8, 8, True),  # streams are dealt in pairs
        (4, 4, 8, 8, False),  # two sequences and two empty ones
        (3, 2, 3, 6, True),
        (3, 2, 1, 7, False),  # every third sequence
        (2, 4, 2, 10, False),
    ],
)
def test_same_micro_batches(ranks, size, streams, batch, same):
    layout = Layout("fsdp", Fsdp(), ranks, size, "float32")
    alone = Layout("fsdp", Fsdp(), 1, size, "float32")
    assert same_micro_batches(layout, alone, streams, batch) == same


# --- recipes --------------------------------------------------------------------------------------------------------

FULL = {
    "name": "bot",
    "model": {"path": "org/model", "revision": "v1", "dtype": "bfloat16"},
    "adapter": {"type": "lora", "dropout": 0.1},
    "data": {
        "train": [{"path": "a.jsonl", "num_epochs": 2.5}, {"path": "b.jsonl", "overlong": "split"}],
        "eval": [{"path": "h.jsonl"}],
        "sequence_length": 4096,
    },
    "train": {"num_epochs": 3, "global_batch_size": 128, "micro_batch_size": 2, "warmup_steps": 500},
    "evaluate": {"every_steps": 10, "early_stopping": {"metric": "h/loss"}},
    "checkpoint": {"path": "s3://bucket/runs", "every_steps": 5, "keep_best": 1},
    "track": {"wandb": {"project": "p"}},
}


def test_the_trial_is_the_recipe_without_what_it_would_leave_behind(tmp_path: Path):
    trial = trial_recipe(Recipe.model_validate(FULL), "/models/m", 3, 4, tmp_path, scale_down=False)
    assert Recipe.model_validate(trial.model_dump()) == trial, "it would be accepted from a file"
    assert list(obstacles(trial)) == []
    assert trial.checkpoint.path == str(tmp_path) and trial.checkpoint.every_steps is None
    assert trial.track.wandb is None and not trial.track.tensorboard
    assert trial.evaluate.every_steps is None and not trial.evaluate.at_start and not trial.evaluate.at_end
    assert (trial.model.path, trial.model.revision) == ("/models/m", None)
    assert trial.train.max_steps == 3 and trial.train.warmup_steps is None and trial.train.lr_scheduler == "constant"
    assert trial.train.global_batch_size == 128 and trial.data.sequence_length == 4096
    assert trial.adapter is not None and trial.adapter.dropout == 0.1
    assert trial.data.streams == 16, "the same for every number of ranks"


def test_scaled_down(tmp_path: Path):
    trial = trial_recipe(Recipe.model_validate(FULL), "/models/m", 3, 4, tmp_path, scale_down=True)
    assert list(obstacles(trial)) == []
    assert (trial.train.global_batch_size, trial.train.micro_batch_size, trial.data.streams) == (10, 2, 10)
    assert trial.data.sequence_length == 512
    assert [source.overlong for source in trial.data.train] == ["truncate_left", "split"]
    small = trial_recipe(recipe(), "/models/m", 3, 4, tmp_path, scale_down=True)
    assert small.train.global_batch_size == 10 and small.data.sequence_length == 512
    many = trial_recipe(Recipe.model_validate(FULL), "/models/m", 3, 32, tmp_path, scale_down=True)
    assert many.train.global_batch_size == 34
    prepared = {**FULL, "data": {**FULL["data"], "train": [{"path": "a.parquet", "format": "tokenized"}]}}
    as_prepared = trial_recipe(Recipe.model_validate(prepared), "m", 3, 4, tmp_path, scale_down=True)
    assert as_prepared.data.sequence_length == 4096


def test_rows_held_out_by_a_fraction_stay_held_out(tmp_path: Path):
    split = recipe(data={"train": [{"path": "a.jsonl"}], "eval": {"fraction": 0.1}})
    assert trial_recipe(split, "m", 3, 4, tmp_path, scale_down=False).data.eval == split.data.eval


def test_what_cannot_be_laid_out_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    muon = trial_recipe(recipe(train={"optimizer": "muon"}), "m", 3, 2, tmp_path, scale_down=False)
    layout = Layout("zero2", WAYS["zero2"], 2, 1, "float32")
    assert "which only adamw is made for" in next(obstacles(laid_out(muon, layout, "x")))
    monkeypatch.setattr(selftest_recipe, "find_spec", lambda name: None)
    plain = trial_recipe(recipe(), "m", 3, 2, tmp_path, scale_down=False)
    assert "deepspeed is not installed" in next(obstacles(laid_out(plain, layout, "x")))


# --- models ---------------------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "layer_types": ["full_attention"] * 32,
}


def test_fewer_layers_and_narrower_ones():
    narrow, shallow = candidates(LLAMA)
    assert narrow == {
        **LLAMA,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    assert shallow == {**LLAMA, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    said = describe(LLAMA, narrow)
    assert said == "num_hidden_layers 2 of 32, hidden_size 128 of 4096, num_attention_heads 1 of 32"


def test_heads_keep_their_size_and_odd_ones_stay():
    odd = {**LLAMA, "hidden_size": 1792, "num_attention_heads": 14, "num_key_value_heads": 2}
    narrow = next(candidates(odd))
    assert (narrow["hidden_size"], narrow["num_attention_heads"], narrow["num_key_value_heads"]) == (896, 7, 1)
    prime = {**LLAMA, "num_attention_heads": 13, "hidden_size": 1664}
    assert next(candidates(prime))["hidden_size"] == 1664


def test_names_of_other_families_and_parts():
    gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "resid_pdrop": 0.1, "attn_pdrop": 0.0}
    narrow = next(candidates(gpt2))
    assert (narrow["n_layer"], narrow["n_embd"], narrow["n_head"]) == (2, 192, 3)
    parts = {"model_type": "gemma3", "text_config": LLAMA, "vision_config": {"num_hidden_layers": 27}}
    composed = next(candidates(parts))
    assert composed["text_config"]["num_hidden_layers"] == 2 and composed["vision_config"] == parts["vision_config"]
    experts = {**LLAMA, "num_local_experts": 64, "moe_intermediate_size": 1024}
    assert next(candidates(experts))["num_local_experts"] == 8
    assert next(candidates(experts))["moe_intermediate_size"] == 32
    assert has_experts(experts) and not has_experts(LLAMA)
    assert dropouts(gpt2) == ["resid_pdrop"]
    assert dropouts({"text_config": {"attention_dropout": 0.1, "hidden_dropout": 0}}) == ["attention_dropout"]
    assert list(candidates({"model_type": "none"})) == [{"model_type": "none"}]
