"""Unknown keys and wrong types at every level of the recipe, found by walking its schema."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ftlaunch.recipes.explain import explain
from ftlaunch.recipes.json_schema import Place, all_places, schema_json
from ftlaunch.recipes.load import _recipe_of
from ftlaunch.recipes.schema import Recipe

RECIPES = Path(__file__).parents[3] / "recipes"

FULL: dict[str, Any] = {
    "name": "full",
    "model": {"path": "m"},
    "adapter": {"type": "lora"},
    "method": {"type": "sft"},
    "data": {"train": [{"path": "a"}], "eval": [{"path": "b"}]},
    "train": {},
    "evaluate": {"every_steps": 1, "early_stopping": {"metric": "b/loss"}},
    "strategy": {"type": "fsdp"},
    "checkpoint": {},
    "track": {"wandb": {"project": "p"}},
    "cluster": {"type": "local"},
}

NEEDED: dict[str, dict[str, Any]] = {
    "kubernetes": {"image": "a", "gpus_per_node": 0},
    "cloud": {"provider": "aws", "instance_type": "a", "regions": ["us-east-1"], "image": "ami-12345678"},
}
"""What kinds of a section must say."""

PODS = {"type": "kubernetes", **NEEDED["kubernetes"]}
WITHIN: dict[str, dict[str, Any]] = {
    "cluster.volumes[]": {**PODS, "volumes": [{"claim": "a", "path": "/a"}]},
    "cluster.tolerations[]": {**PODS, "tolerations": [{"key": "a"}]},
    "cluster.nodes": {"type": "ray", "nodes": {"min": 1, "max": 2}},
    "cluster.container": {"type": "slurm", "container": {"runtime": "pyxis", "image": "x"}},
}
"""Sections that only some kinds of a section have: in which."""


def recipe_with(place: Place) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A valid recipe that has this kind of section, the section in it, and its dotted key."""
    recipe = copy.deepcopy(FULL)
    if place.key == "data.eval":
        recipe["data"]["eval"] = {"fraction": 0.1}
    if place.tag:
        recipe[place.key] = {"type": place.tag, **NEEDED.get(place.tag, {})}
    if place.key in WITHIN:
        recipe[place.key.partition(".")[0]] = copy.deepcopy(WITHIN[place.key])
    section: Any = recipe
    parts = place.key.replace("[]", ".0").split(".") if place.key else []
    for part in parts:
        section = section[int(part)] if part.isdecimal() else section[part]
    return recipe, section, ".".join(parts)


def name_of(place: Place) -> str:
    return str(place) or "top level"


def test_the_walk_reaches_every_section() -> None:
    keys = {place.key for place in all_places()}
    assert keys >= {"", "model", "adapter", "data.train[]", "data.eval[]", "data.eval", "evaluate.early_stopping"}
    assert {place.tag for place in all_places() if place.key == "strategy"} >= {"ddp", "fsdp"}


@pytest.mark.parametrize("place", all_places(), ids=name_of)
def test_unknown_key_at_every_level(place: Place) -> None:
    recipe, section, key = recipe_with(place)
    assert list(explain(recipe)) == []
    section["zzqx"] = 1
    (problem,) = explain(recipe)
    assert problem.key == (f"{key}.zzqx" if key else "zzqx")
    assert problem.message == "unknown key"
    assert all(name in problem.remedy for name in place.properties), "the remedy lists the keys there are"
    if place.tag:
        assert f"of type {place.tag}" in problem.remedy


@pytest.mark.parametrize("place", all_places(), ids=name_of)
def test_wrong_type_of_every_key(place: Place) -> None:
    for name in place.properties:
        recipe, section, key = recipe_with(place)
        section[name] = [{"neither": "this"}, "nor that"]
        with pytest.raises(ValidationError):
            Recipe.model_validate_json(json.dumps(recipe), strict=True)
        found = list(explain(recipe))
        expected_key = f"{key}.{name}" if key else name
        assert found, expected_key
        assert all(problem.key == expected_key or problem.key.startswith(f"{expected_key}.") for problem in found)


def test_committed_schema_is_the_generated_one() -> None:
    committed = json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))
    assert committed == schema_json(), "run `ftlaunch schema > recipes/recipe.schema.json`"


def test_schema_of_a_file_differs_from_the_models() -> None:
    schema = schema_json()
    assert "name" not in schema["required"]
    assert {"type": "string"} in schema["properties"]["cluster"]["anyOf"]
    assert schema["$defs"]["Ddp"]["required"] == ["type"]
    assert "required" not in schema["$defs"]["Lora"]
    assert schema["$defs"]["Train"]["properties"]["learning_rate"]["description"].startswith("Peak learning rate")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10) | st.floats(width=16) | st.sampled_from(["", "sft", "all", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "path", "x"]), inner),
    max_leaves=4,
)
KEYS = [(place, name) for place in all_places() for name in place.properties]


@settings(max_examples=400)
@given(where=st.sampled_from(KEYS), value=PLAIN)
def test_the_walk_and_pydantic_agree_on_what_is_valid(where: tuple[Place, str], value: Any) -> None:
    place, name = where
    assume(name != "cluster" or not isinstance(value, str))  # a profile's name, read before anything is checked
    recipe, section, _ = recipe_with(place)
    section[name] = value
    _, invalid = _recipe_of(recipe)
    assert invalid == list(explain(recipe))
