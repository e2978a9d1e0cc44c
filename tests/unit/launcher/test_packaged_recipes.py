"""Every recipe that comes with ftlaunch plans on the machine it is written for, on data of the shape it names."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ftlaunch.launcher.catalogue import headline, packaged_recipes
from ftlaunch.launcher.hardware import Machine
from ftlaunch.launcher.plan import make_plan
from ftlaunch.launcher.plan_data import named_sources, paths_of
from ftlaunch.launcher.plan_world import BatchPlan, WorldPlan
from ftlaunch.recipes.load import load_recipe
from ftlaunch.recipes.schema import Source

ROWS = {
    "chat": {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]},
    "prompt_completion": {"prompt": "one?", "completion": "two"},
    "text": {"text": "one two"},
}


def write_data(source: Source) -> None:
    """A file for each path of a source."""
    row = {source.columns.get(name, name): value for name, value in ROWS[source.format or "chat"].items()}
    for path in paths_of(source):
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
    text = packaged_recipes()[name]
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
