"""Every recipe that comes with ftlaunch plans on the machine it is written for, on data of the shape it names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ftlaunch.launcher.catalogue import headline, packaged_recipes
from ftlaunch.launcher.hardware import Machine
from ftlaunch.launcher.plan import make_plan
from ftlaunch.launcher.plan_data import named_sources
from ftlaunch.launcher.plan_world import BatchPlan, WorldPlan
from ftlaunch.recipes.load import load_recipe
from ftlaunch.recipes.schema import Source

ROWS = {
    "chat": {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]},
    "prompt_completion": {"prompt": "one?", "completion": "two"},
    "text": {"text": "one two"},
}


def on_disk(recipe: str) -> str:
    """A recipe whose object store is a folder here: planning looks at files, and there is no network."""
    return recipe.replace("s3://acme/", "")


def write_data(source: Source) -> None:
    """A file for each path of a source."""
    row = {source.columns.get(name, name): value for name, value in ROWS[source.format or "chat"].items()}
    for path in source.paths:
        file = Path(path.replace("*", "part-0"))
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row] * 3), file)
        else:
            lines = (json.dumps(row) + "\n").encode() * 3
            file.write_bytes(zstandard.compress(lines) if file.suffix == ".zst" else lines)


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_plans(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = on_disk(packaged_recipes()[name])
    Path(f"{name}.yaml").write_text(text)
    loaded = load_recipe(f"{name}.yaml", environ={})
    for _, _, source in named_sources(loaded.recipe):
        write_data(source)
    plan = make_plan(loaded, Machine(gpus=loaded.recipe.cluster.gpus_per_node or 1))
    assert headline(text)
    assert isinstance(plan.world, WorldPlan)
    assert plan.world.device == "cuda"
    assert isinstance(plan.batch, BatchPlan)
    assert plan.batch.empty_sequences == 0
    assert plan.problems == ()


OFFLINE = """
import sys
from ftlaunch.launcher.cli import main
for name in sys.argv[1:]:
    plan = ["plan", name, "--gpus-per-node", "0"]
    codes = main([*plan, "--json"]), main(plan), main([*plan, "--strict"])
    print("CODES", name, codes)
print("IMPORTED", sorted({"torch", "ray", "transformers", "pandas"} & set(sys.modules)))
"""


def test_offline_every_recipe_plans_with_what_is_unknown_and_without_torch(tmp_path, monkeypatch):
    """No hub and none of the recipe's GPUs: `plan` says what it cannot know, and only `--strict` minds."""
    monkeypatch.chdir(tmp_path)
    for name, text in packaged_recipes().items():
        Path(f"{name}.yaml").write_text(on_disk(text))
        for _, _, source in named_sources(load_recipe(f"{name}.yaml", environ={}).recipe):
            write_data(source)
    files = [f"{name}.yaml" for name in packaged_recipes()]
    done = subprocess.run([sys.executable, "-c", OFFLINE, *files], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("CODES")] == [f"CODES {file} (0, 0, 1)" for file in files]
    assert lines[-1] == "IMPORTED []", done.stderr
    assert done.stdout.count("unknown: ") >= 2 * len(files)
