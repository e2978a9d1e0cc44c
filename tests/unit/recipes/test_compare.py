"""What running again with a changed recipe means."""

from __future__ import annotations

from typing import Any

import pytest

from ftlaunch.recipes.compare import KINDS, Change, compare
from ftlaunch.recipes.json_schema import all_places
from ftlaunch.recipes.schema import Recipe

BASE: dict[str, Any] = {"name": "r", "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({**BASE, **sections})


def kinds(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    return {change.key: change.kind for change in compare(recipe(**old), recipe(**new)).changes}


def test_the_same_recipe_has_no_changes() -> None:
    assert compare(recipe(), recipe()).changes == ()
    assert kinds({}, {"train": {"num_epochs": 1}}) == {}, "one epoch is what no duration means"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"cluster": {"type": "ray"}}, {"cluster": "continues"}),
        ({"cluster": {"type": "local", "nodes": 4}}, {"cluster.nodes": "continues"}),
        ({"track": {"wandb": {"project": "p"}}}, {"track.wandb": "continues"}),
        (
            {"checkpoint": {"every_steps": 3, "keep_last": 9}},
            dict.fromkeys(["checkpoint.every_steps", "checkpoint.keep_last"], "continues"),
        ),
        ({"evaluate": {"every_steps": 3}}, {"evaluate.every_steps": "continues"}),
        ({"strategy": {"type": "ddp"}}, {"strategy": "continues"}),
        ({"data": {**BASE["data"], "reader_processes": 2}}, {"data.reader_processes": "continues"}),
        ({"data": {**BASE["data"], "disk_cache_gb": 2.5}}, {"data.disk_cache_gb": "continues"}),
        (
            {"strategy": {"type": "fsdp", "reshard_after_forward": False}},
            {"strategy.reshard_after_forward": "continues"},
        ),
        ({"model": {"path": "m", "attention": "eager"}}, {"model.attention": "continues"}),
        ({"model": {"path": "n"}}, {"model.path": "stops"}),
        ({"model": {"path": "m", "dtype": "float32"}}, {"model.dtype": "stops"}),
        ({"adapter": {}}, {"adapter": "stops"}),
        ({"method": {"type": "cpt"}}, {"method": "stops"}),
        ({"method": {"type": "sft", "train_on": "all"}}, {"method.train_on": "stops"}),
        ({"data": {"train": [{"path": "b"}]}}, {"data.train.0.path": "stops"}),
        ({"data": {"train": [{"path": "a"}, {"path": "b"}]}}, {"data.train": "stops"}),
        ({"data": {"train": [{"path": "a"}], "eval": {"fraction": 0.1}}}, {"data.eval": "stops"}),
        ({"data": {"train": [{"path": "a", "columns": {"text": "t"}}]}}, {"data.train.0.columns.text": "stops"}),
        ({"train": {"micro_batch_size": 4, "seed": 3}}, {"train.micro_batch_size": "continues", "train.seed": "stops"}),
        ({"train": {"activation_checkpointing": True}}, {"train.activation_checkpointing": "continues"}),
        (
            {"train": {"compile": True, "deterministic": True}},
            dict.fromkeys(["train.compile", "train.deterministic"], "continues"),
        ),
        ({"train": {"global_batch_size": 64}}, {"train.global_batch_size": "stops"}),
        ({"train": {"betas": [0.9, 0.95]}}, {"train.betas.1": "stops"}),
    ],
)
def test_change(sections: dict[str, Any], expected: dict[str, str]) -> None:
    assert kinds({}, sections) == expected
    assert kinds(sections, {}) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({}, {"num_epochs": 3}, {"train.num_epochs": "extends"}),
        ({"num_epochs": 3}, {}, {"train.num_epochs": "stops"}),
        ({"max_steps": 10}, {"max_steps": 11}, {"train.max_steps": "extends"}),
        ({"max_steps": 10}, {"max_steps": 9}, {"train.max_steps": "stops"}),
        ({"max_tokens": 10}, {"max_tokens": 20}, {"train.max_tokens": "extends"}),
        ({"max_steps": 10}, {"num_epochs": 3}, {"train.num_epochs": "stops", "train.max_steps": "stops"}),
        ({"max_steps": 10}, {}, {"train.num_epochs": "stops", "train.max_steps": "stops"}),
    ],
)
def test_duration(old: dict[str, Any], new: dict[str, Any], expected: dict[str, str]) -> None:
    assert kinds({"train": old}, {"train": new}) == expected


def test_changes_by_kind_and_as_text() -> None:
    new = recipe(train={"num_epochs": 2, "seed": 1, "compile": True}, strategy={"type": "ddp"})
    comparison = compare(recipe(), new)
    assert [change.key for change in comparison.continues] == ["train.compile", "strategy"]
    assert comparison.extends == (Change("train.num_epochs", 1, 2, "extends"),)
    assert [str(change) for change in comparison.stops] == ["train.seed: 0 -> 1"]
    assert str(comparison.continues[1]) == (
        "strategy: {type: fsdp, shard: world, offload: none, reshard_after_forward: true} -> {type: ddp}"
    )


def test_every_top_level_key_has_been_thought_about() -> None:
    (top,) = [place for place in all_places() if place.key == ""]
    assert set(top.properties) <= set(KINDS)
    known = {f"{place.key}.{name}" for place in all_places() for name in place.properties} | set(top.properties) | {""}
    assert set(KINDS) <= known
