"""Hints for unknown keys."""

from __future__ import annotations

from typing import Any

import pytest

from ftlaunch.recipes.foreign_names import FOREIGN_NAMES
from ftlaunch.recipes.hints import hint
from ftlaunch.recipes.json_schema import all_places
from ftlaunch.recipes.problems import dotted

OUR_KEYS = {dotted(place.key.replace("[]", ""), name) for place in all_places() for name in place.properties}


@pytest.mark.parametrize("name", sorted(FOREIGN_NAMES))
def test_foreign_names_lead_to_keys_that_exist(name: str) -> None:
    target, note = FOREIGN_NAMES[name]
    assert name == name.lower()
    assert note
    assert not target or target in OUR_KEYS or f"data.train.{target}" in OUR_KEYS
    assert name not in {key.rpartition(".")[2] for key in OUR_KEYS}, "it would never be looked up"


@pytest.mark.parametrize(
    ("name", "section", "siblings", "words"),
    [
        ("learning_rte", "train", ("learning_rate", "seed"), "did you mean learning_rate?"),
        ("learning_rate", "", ("model", "data"), "learning_rate belongs under train"),
        ("project", "track", ("wandb",), "project belongs under track.wandb"),
        ("model", "train", ("seed",), "model belongs at the top level"),
        ("reshard_after_forward", "strategy", ("type",), "belongs to strategy of type fsdp"),
        ("per_device_train_batch_size", "", (), "here that is train.micro_batch_size"),
        ("gradient_accumulation_steps", "train", (), "accumulation is derived"),
        ("micro_batch_size", "", (), "micro_batch_size belongs under train"),
        ("LoRA_r", "", (), "here that is adapter.rank"),
        ("peft_use_dora", "", (), "here that is adapter.use_dora"),
        ("init_lora_weights", "adapter", ("type",), "here that is adapter.init"),
        ("per_device_train_batchsize", "", (), "here that is train.micro_batch_size"),
        ("sequense_length", "", ("model",), "did you mean data.sequence_length?"),
        ("zzz", "train", ("seed",), ""),
    ],
)
def test_hint(name: str, section: str, siblings: tuple[str, ...], words: str) -> None:
    said = hint(name, section, siblings)
    assert words in said
    assert bool(words) == bool(said)


def test_a_recipe_of_another_tool(problems: Any) -> None:
    text = """\
base_model: m
datasets: [{path: a}]
sequence_len: 2048
sample_packing: true
lora_r: 8
lr_scheduler_type: cosine
val_set_size: 0.05
wandb_project: p
"""
    hints = {problem.key: problem.remedy for problem in problems(text) if problem.key in FOREIGN_NAMES}
    assert {key: remedy.split()[3].rstrip(":") for key, remedy in hints.items()} == {
        "base_model": "model.path",
        "datasets": "data.train",
        "sequence_len": "data.sequence_length",
        "sample_packing": "data.packing",
        "lora_r": "adapter.rank",
        "lr_scheduler_type": "train.lr_scheduler",
        "val_set_size": "data.eval",
        "wandb_project": "track.wandb",
    }
