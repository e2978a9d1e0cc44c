"""The stream in real processes that are killed: 4 ranks, then 2, 3 and 1 see what one uninterrupted rank sees."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from streams import KINDS, write_file

from ftlaunch.distributed.data.build import build_index
from ftlaunch.recipes.schema import Data, Model, Recipe, Train, TrainSource

RANK = Path(__file__).with_name("stream_rank.py")
STREAMS = 4


def make_recipe(folder):
    """Two weighted sources, parquet and every other kind of file, with documents that must be split."""
    lengths = np.random.default_rng(0).integers(2, 40, 400).tolist()
    texts = [f"{number} {length}" for number, length in enumerate(lengths)]
    pq.write_table(pa.table({"text": texts[:250]}), folder / "a.parquet", row_group_size=30)
    (folder / "b").mkdir()
    for place, kind in enumerate(KINDS):
        write_file(folder / "b" / str(place), texts[250 + place * 30 : 280 + place * 30], kind)
    sources = (
        TrainSource(path=str(folder / "a.parquet"), format="text", weight=0.7),
        TrainSource(path=str(folder / "b"), format="text", weight=0.3),
    )
    build_index(sources, ["a", "b"], block_bytes=500).save(str(folder), "train")
    recipe = Recipe(
        name="t",
        model=Model(path="m"),
        data=Data(train=sources, sequence_length=32, pack_buffer=8),
        train=Train(global_batch_size=STREAMS, num_epochs=1, seed=5),
    )
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    return folder / "recipe.json"


def wait_for(paths, ranks):
    while not all(path.exists() for path in paths):
        assert all(rank.poll() is None for rank in ranks), "a rank died"
        time.sleep(0.02)


def run_world(recipe, world, states, out, steps, readers=0):
    """What `world` ranks see; with `steps`, all are killed when each has done so many and reads ahead. `readers`:
    processes of each rank that read; 0: a thread."""
    out.mkdir()
    arguments = [str(STREAMS), str(states) if states else "-", str(out), str(steps) if steps else "-", str(readers)]
    ranks = [
        subprocess.Popen([sys.executable, str(RANK), str(recipe), str(rank), str(world), *arguments])
        for rank in range(world)
    ]
    try:
        if steps:
            wait_for([out / f"{steps - 1:04}-{rank}.json" for rank in range(world)], ranks)
        else:
            assert [rank.wait(timeout=300) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    numbers = sorted({path.name[:4] for path in out.glob("*.json")})
    return [[json.loads((out / f"{n}-{rank}.json").read_text()) for rank in range(world)] for n in numbers]


def merged(step):
    """The bins of a step from all ranks, by number."""
    return sorted(one for rank in step for one in rank["bins"])


def served_bytes(steps):
    return sum(rank["served"] for step in steps for rank in step)


def test_killed_processes_at_changing_world_sizes_equal_one_that_was_not(tmp_path):
    recipe = make_recipe(tmp_path)
    whole = run_world(recipe, 1, None, tmp_path / "whole", None)
    seen, states = [], None
    for world, steps, readers in [(4, 3, 1), (2, 5, 2), (3, 4, 0), (1, None, 3)]:
        part = run_world(recipe, world, states, tmp_path / f"{world}", steps, readers)
        seen += part
        union = {number: state for rank in part[-1] for number, state in rank["state"].items()}
        assert sorted(union) == [str(number) for number in range(STREAMS)]
        states = tmp_path / f"state-{world}.json"
        states.write_text(json.dumps(union))
    real = [merged(step) for step in whole if merged(step)]
    assert [merged(step) for step in seen if merged(step)] == real
    assert sum(rank["served"] for step in seen for rank in step) == sum(
        rank["served"] for step in whole for rank in step
    )
    primary = Counter(row for step in real for _, rows in step for row in rows if row < 250)
    assert set(primary) == set(range(250)), "every row of the primary source came by"
