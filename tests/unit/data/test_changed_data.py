"""Files that are no longer what they were when a run began: seen, refused or accepted, and the order begun again."""

from __future__ import annotations

import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlaunch.distributed import storage
from ftlaunch.distributed.checkpoint.commit import COMMITS
from ftlaunch.distributed.data import jsonl
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.changes import find_changes
from ftlaunch.distributed.data.epoch_again import begin_epoch_again
from ftlaunch.distributed.data.lane_plan import plan_lanes
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.distributed.indexing import (
    accept_changed_data,
    digest_of,
    index_data,
    load_index,
    same_sources,
    train_index,
)
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.base import IGNORED, Batch, RowId, Sample
from ftlaunch.recipes.schema import Data, Model, Recipe, Train, TrainSource


def write(path, numbers):
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in numbers))


def recipe_of(folder, **data):
    sources = (TrainSource(path=str(folder), format="text"),)
    return Recipe(name="t", model=Model(path="m"), data=Data(train=sources, **data), train=Train(num_epochs=3))


@pytest.fixture
def run(tmp_path):
    """A run with a checkpoint, over two files."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/a.jsonl", range(30))
    write(tmp_path / "data/b.jsonl", range(30, 60))
    run = RunDirectory(str(tmp_path / "run"))
    index_data(recipe_of(tmp_path / "data"), run)
    storage.write_bytes(run.path(COMMITS, "step-000001.json"), b"{}")
    return run


def grow(data):
    write(data / "a.jsonl", range(40))


def replace_with_as_many_bytes(data):
    write(data / "a.jsonl", reversed(range(30)))
    os.utime(data / "a.jsonl", ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (grow, r"a\.jsonl: grew since"),
        (lambda data: write(data / "a.jsonl", range(9)), r"a\.jsonl: shrank since"),
        (replace_with_as_many_bytes, r"a\.jsonl: changed since"),
        (lambda data: (data / "b.jsonl").unlink(), r"b\.jsonl: not found any more"),
        (lambda data: write(data / "c.jsonl", range(3)), r"c\.jsonl: new since"),
    ],
)
def test_every_change_is_refused_by_name_and_can_be_accepted_once(run, tmp_path, change, says):
    data, recipe = tmp_path / "data", recipe_of(tmp_path / "data")
    indexed = train_index(recipe.data)
    before = load_index(run, indexed)
    assert index_data(recipe, run) == []
    change(data)
    with pytest.raises(UserError, match=rf"(?s){says}.*--accept-changed-data"):
        index_data(recipe, run)
    accept_changed_data(run)
    (note,) = index_data(recipe, run)
    assert note.startswith("data.train is read as it is now")
    after = load_index(run, indexed)
    assert [file.url for file in after.files] == [str(path) for path in sorted(data.iterdir())]
    assert not find_changes(after, recipe.data.train)
    old, new = digest_of(indexed, before), digest_of(indexed, after)
    assert old != new
    assert same_sources(old, new)
    assert index_data(recipe, run) == [], "what was accepted is what is compared from now on"
    write(data / "d.jsonl", range(3))
    with pytest.raises(UserError, match=r"d\.jsonl: new since"):
        index_data(recipe, run)


def test_a_run_without_a_checkpoint_takes_files_as_they_are(run, tmp_path):
    grow(tmp_path / "data")
    storage.delete_tree(run.path(COMMITS))
    assert len(index_data(recipe_of(tmp_path / "data"), run)) == 1


def test_unchanged_files_are_not_scanned_again(run, tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path / "data")
    write(tmp_path / "data/c.jsonl", range(60, 70))
    scanned = []
    scan = jsonl.scan
    monkeypatch.setattr(
        jsonl, "scan", lambda file, block_bytes: scanned.append(file.url[-7:]) or scan(file, block_bytes)
    )
    accept_changed_data(run)
    index_data(recipe, run)
    assert sorted(scanned) == ["a.jsonl", "c.jsonl"], "the first shows the columns that the new one is held against"
    fresh = build_index(recipe.data.train, ["data"])
    index = load_index(run, train_index(recipe.data))
    assert (index.files, index.block_start.tolist()) == (fresh.files, fresh.block_start.tolist())


def encode(row, _row_format):
    return Sample(np.full(2, int(row["text"]), np.int32), np.ones(2, bool), RowId("", "", 0, 0))


def collate(bins, length):
    ids = np.full((len(bins), length), -1, np.int64)
    for place, samples in enumerate(bins):
        tokens = [int(sample.input_ids[0]) for sample in samples]
        ids[place, : len(tokens)] = tokens
    return Batch(ids, ids, np.full_like(ids, IGNORED), tuple(() for _ in bins), int((ids >= 0).sum()))


def numbers_in(step):
    return Counter(int(n) for micro in step.micro_batches for n in micro.batch.input_ids.ravel() if n >= 0)


def stream_of(index, recipe, states=None):
    stream = open_stream(
        index=index, recipe=recipe, world_rank=0, world_size=1, streams=4, encode=encode, collate=collate,
    )  # fmt: skip
    if states is not None:
        stream.restore(states)
    return stream


def drain(stream):
    rows, served = Counter(), 0
    while (step := stream.next_step()).num_bins:
        rows += numbers_in(step)
        served += step.served_bytes
    stream.close()
    return rows, served


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 40), st.integers(0, 2**16), st.booleans())
def test_the_epoch_begins_again_on_the_new_files(steps, seed, shuffle):
    """Earlier epochs are done; what is left is served in full, and progress ends at what there is to serve."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "a.jsonl", range(40))
        write(folder / "b.jsonl", range(40, 80))
        train = Train(num_epochs=3, global_batch_size=4, micro_batch_size=2, seed=seed)
        data = Data(train=(TrainSource(path=name, format="text"),), sequence_length=8, pack_buffer=3, shuffle=shuffle)
        recipe = Recipe(name="t", model=Model(path="m"), data=data, train=train)
        first = stream_of(build_index(data.train, ["s"], block_bytes=64), recipe)
        for _ in range(steps):
            first.next_step()
        states = json.loads(json.dumps(first.state()))
        first.close()

        write(folder / "b.jsonl", range(40, 60))
        write(folder / "c.jsonl", range(100, 130))
        index = build_index(data.train, ["s"], block_bytes=64)
        plans = plan_lanes(index, data, train, 4)
        again = begin_epoch_again(states, plans)
        rows, served = drain(stream_of(index, recipe, again.states))
        here = [*range(60), *range(100, 130)]
        assert rows == Counter(dict.fromkeys(here, 3 - again.epoch) if again.epoch < 3 else {})
        assert again.served_bytes + served == 3 * plans[0].order.nbytes
        assert json.dumps(again.states)
