"""What `plan` reads from headers is what a rank finds in the model it has built, for every family and adapter."""

from __future__ import annotations

import pytest
import torch
from families import make_config_folder
from transformers import AutoConfig, AutoModelForCausalLM

from ftlaunch.distributed.checkpoint.layout import open_folder
from ftlaunch.distributed.estimate.outline import Widths, with_adapter
from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import ModelFolder
from ftlaunch.distributed.outline import outline_of
from ftlaunch.launcher.plan_model import from_headers
from ftlaunch.recipes.schema import Recipe


@pytest.fixture
def folder(tmp_path):
    """Makes a stored model of a family."""

    def make(model_type: str, **changes) -> ModelFolder:
        place = make_config_folder(tmp_path / model_type, model_type, **changes)
        config = AutoConfig.from_pretrained(place)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
        return ModelFolder(str(place))

    return make


def recipe(folder: ModelFolder, **sections) -> Recipe:
    model = {"path": folder.url, "attention": "eager", **sections.pop("model", {})}
    return Recipe.model_validate({"name": "a", "model": model, "data": {"train": [{"path": "a"}]}, **sections})


def both(one: Recipe, folder: ModelFolder):
    planned = from_headers(one, folder.config, open_folder(folder.url)).outline
    return planned, outline_of(build_model(one, folder), folder.config)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "gemma2", "gpt_neox", "gpt2"])
def test_headers_and_ranks_agree(folder, model_type):
    place = folder(model_type, tie_word_embeddings=model_type in ("gemma2", "gpt2"))
    planned, built = both(recipe(place), place)
    assert planned == built
    assert len(planned.blocks) == planned.layers == 2
    assert planned.trained == sum(tensor.numel() for tensor in _model(place).parameters())
    assert planned.widths.is_gated == (model_type not in ("gpt_neox", "gpt2"))


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4},
        {"rank": 4, "modules_to_save": ["lm_head"]},
        {"rank": 4, "use_dora": True},
        {"rank": 4, "init": "pissa"},
        {"type": "qlora", "rank": 4},
        {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=str,
)
def test_headers_and_ranks_agree_on_adapters(folder, adapter):
    place = folder("llama")
    planned, built = both(recipe(place, adapter=adapter), place)
    assert planned == built
    assert planned.trained == sum(p.numel() for p in _trained(recipe(place, adapter=adapter), place))
    assert (planned.packed > 0) == (adapter.get("type") == "qlora")
    assert planned.is_head_trained == ("modules_to_save" in adapter)


def test_headers_and_ranks_agree_on_chosen_layers(folder):
    place = folder("llama")
    planned, built = both(recipe(place, model={"train_layers": ["model.layers.1.*"]}), place)
    assert planned == built
    assert sorted(unit.trained > 0 for unit in planned.blocks) == [False, True]


def test_widths_come_from_the_configuration(folder):
    place = folder("qwen3")  # whose heads are wider together than the hidden states
    planned, _ = both(recipe(place), place)
    assert planned.widths == Widths(hidden=40, queries=48, keys=24, inner=52, is_gated=True, vocabulary=307, heads=4)


def test_families_that_change_their_logits_are_known(folder):
    changes = {name: _changes_logits(folder(name)) for name in ("gemma2", "granite", "olmo2")}
    assert changes == {"gemma2": True, "granite": True, "olmo2": False}


def _changes_logits(place: ModelFolder) -> bool:
    planned, _ = both(recipe(place), place)
    return planned.widths.changes_logits


def test_an_adapter_that_is_only_thought_of_is_the_one_that_would_be_made(folder):
    place = folder("llama")
    plain, _ = both(recipe(place), place)
    made, _ = both(recipe(place, adapter={"rank": 4}), place)
    thought = with_adapter(plain, 4)
    assert (thought.trained, thought.frozen, sorted(thought.state)) == (made.trained, made.frozen, list(made.state))
    assert (thought.adapted, thought.adapter_ranks) == (made.adapted, made.adapter_ranks)


def _model(folder: ModelFolder):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder.url))


def _trained(one: Recipe, folder: ModelFolder):
    return [p for p in build_model(one, folder).loss_model.parameters() if p.requires_grad]
