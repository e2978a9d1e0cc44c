"""Models and data that come from a hub: real processes, the real hub client, a hub on loopback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hub import Hub, serving
from processes import rank_alone, run, torchrun
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer, recipe_for, text_rows, write_parquet, write_recipe
from training import read_run, train_all


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


def a_model(folder: Path, seed: int) -> Path:
    make_tokenizer(folder)
    make_model(folder, seed=seed)
    return folder


def recipe_on_the_hub(folder: Path, **model: str) -> str:
    recipe = recipe_for(folder, train={"max_steps": 2}, checkpoint={"every_steps": 1})
    recipe["model"] = {**recipe["model"], "path": "acme/tiny", **model}
    return str(write_recipe(folder / "hub.yaml", recipe))


def test_a_run_keeps_the_commit_it_began_on(hub: Hub, tmp_path):
    """Two ranks fetch the model; when the hub's branch moves, going on uses what the run began with."""
    first = hub.push("acme/tiny", a_model(tmp_path / "one", seed=1))
    recipe = recipe_on_the_hub(tmp_path)
    code, output = run(torchrun(2, recipe), tmp_path, hub.environment(tmp_path / "home"))
    assert code == 0, output
    directory = tmp_path / "runs/tiny"
    assert json.loads((directory / "facts.json").read_text())["model_revision"] == first

    hub.push("acme/tiny", a_model(tmp_path / "two", seed=2))
    hub.asked.clear()
    another = hub.environment(tmp_path / "another-home")
    code, output = run(rank_alone(recipe, "train.max_steps=3"), tmp_path, another)
    assert code == 0, output
    assert any(f"/resolve/{first}/" in path for path in hub.asked)
    assert not any("/revision/main" in path for path in hub.asked)
    assert len(read_run(directory).losses) == 3


def test_a_run_trains_on_data_of_the_hub_as_on_the_same_files_here(hub: Hub, tmp_path):
    recipe = recipe_for(tmp_path, train={"max_steps": 3}, checkpoint={"every_steps": None})
    here = write_parquet(tmp_path / "train-0.parquet", text_rows(60))
    recipe["data"] |= {"train": [{"path": str(here), "format": "text", "name": "texts"}], "eval": []}
    [local] = train_all([{**recipe, "name": "here"}], 2)
    commit = hub.push("acme/texts", {"data/train-0.parquet": here.read_bytes(), "data/test-0.parquet": b"never read"})
    recipe["data"]["train"][0] |= {"path": "hub:acme/texts", "split": "train"}
    home = {**hub.environment(tmp_path / "home"), "HF_DATASETS_OFFLINE": "0"}
    code, output = run(torchrun(2, str(write_recipe(tmp_path / "texts.yaml", recipe))), tmp_path, home)
    assert code == 0, output
    by_name = read_run(tmp_path / "runs/tiny")
    assert len(by_name.losses) == 3
    assert by_name.losses == local.losses
    assert any(f"/resolve/{commit}/data/train-0.parquet" in path for path in hub.asked)


FIND = """
import json
from ftlaunch.distributed.model_files import find_model
found = [find_model(path, pickles=pickles).names for path in ("acme/pickled", "acme/both") for pickles in (False, True)]
print(json.dumps([[name for name in names if "model" in name] for names in found]))
"""


def test_pickled_weights_are_fetched_only_where_that_is_said(hub: Hub, tmp_path):
    """And not beside safetensors."""
    folder = a_model(tmp_path / "pickled", seed=1)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    hub.push("acme/both", folder)
    (folder / "model.safetensors").unlink()
    hub.push("acme/pickled", folder)
    code, output = run([sys.executable, "-c", FIND], tmp_path, hub.environment(tmp_path / "home"))
    assert code == 0, output
    assert json.loads(output.splitlines()[-1]) == [
        [],
        ["pytorch_model.bin"],
        ["model.safetensors"],
        ["model.safetensors"],
    ]


def test_what_is_not_on_the_hub_is_named(hub: Hub, tmp_path):
    recipe = recipe_on_the_hub(tmp_path, path="acme/nothing")
    code, output = run(rank_alone(recipe), tmp_path, hub.environment(tmp_path / "home"))
    assert code == 1
    assert "there is no folder 'acme/nothing', and no model of that name on the hub" in output
    hub.push("acme/tiny", a_model(tmp_path / "one", seed=1))
    recipe = recipe_on_the_hub(tmp_path, revision="v9")
    code, output = run(rank_alone(recipe, "name=other"), tmp_path, hub.environment(tmp_path / "home"))
    assert code == 1
    assert "acme/tiny has no revision 'v9'" in output


def test_a_hub_out_of_reach_is_trouble_of_the_infrastructure(tmp_path):
    recipe = recipe_on_the_hub(tmp_path)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    code, output = run(rank_alone(recipe), tmp_path, nowhere)
    assert code != 0
    assert "the model hub cannot be reached" in output
