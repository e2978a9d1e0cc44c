"""Readers as processes: the same steps as a thread makes, the same errors, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stream_rows import encode, encode_or_fail
from test_stream_processes import RANK, STREAMS, make_recipe
from tiny import recipe_for
from training import train

from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.index import Index
from ftlaunch.distributed.data.node_cache import LARGE_BYTES
from ftlaunch.distributed.data.process_feed import ProcessFeed
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.recipes.errors import InfrastructureError, UserError
from ftlaunch.recipes.methods.causal import lay_out
from ftlaunch.recipes.schema import Data, Model, Recipe, Train, TrainSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_recipe(folder)
    return folder


def open_readers(folder, readers, micro_batch_size=1, encode=encode, world=1):
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    train = recipe.train.model_copy(update={"micro_batch_size": micro_batch_size})
    return open_stream(
        index=Index.load(str(folder), "train"), recipe=recipe.model_copy(update={"train": train}), world_rank=0,
        world_size=world, streams=STREAMS, encode=encode, collate=lay_out, reader_processes=readers,
    )  # fmt: skip


def content(step):
    """What a step is made of; what was read for it depends on how far readers are ahead."""
    batches = []
    for batch, first_bin in step.micro_batches:
        arrays = [array.tolist() for array in (batch.input_ids, batch.position_ids, batch.targets)]
        batches.append((first_bin, batch.rows, batch.num_tokens, arrays))
    return batches, step.served_bytes, step.counters, step.num_bins, step.num_tokens, step.rejections


def read(stream, limit=1000):
    """Steps with the state behind each, to the end."""
    seen = []
    with closing(stream):
        while len(seen) < limit:
            step = stream.next_step()
            seen.append((content(step), stream.state()))
            if not step.num_bins:
                break
    return seen


def pids(stream):
    return [feed.pid for feed in stream._feeds if isinstance(feed, ProcessFeed)]


def ends(pid):
    """Whether a reader ends, in a minute at most."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("readers", [0, 1, 3])
def test_readers_say_how_long_they_stood_still(folder, readers):
    with closing(open_readers(folder, readers)) as stream:
        assert stream.next_step().reader_idle_s == 0.0, "nothing waited for the loop yet"
        while not stream.next_step().reader_idle_s:
            time.sleep(0.01)


@pytest.mark.parametrize(("readers", "micro_batch_size", "processes"), [(1, 1, 1), (3, 1, 3), (9, 2, 2), (2, 3, 1)])
def test_any_number_of_readers_makes_the_same_steps(folder, readers, micro_batch_size, processes):
    whole = read(open_readers(folder, 0, micro_batch_size))
    stream = open_readers(folder, readers, micro_batch_size)
    assert len(pids(stream)) == processes
    assert read(stream) == whole
    assert len(whole) > 20


def test_readers_go_on_from_a_state(folder):
    whole = read(open_readers(folder, 0))
    first = open_readers(folder, 2)
    with closing(open_readers(folder, 0)) as thread:
        assert first.state() == thread.state()
    head = read(first, 5)
    second = open_readers(folder, 3)
    second.restore(json.loads(json.dumps(head[-1][1])))
    assert second.state() == head[-1][1]
    assert head + read(second) == whole


def test_arrays_may_be_changed_and_outlive_the_reader(folder):
    with closing(open_readers(folder, 1)) as stream:
        batch = stream.next_step().micro_batches[0].batch
    before = batch.input_ids.copy()
    np.add(batch.input_ids, 1, out=batch.input_ids)
    assert np.array_equal(batch.input_ids, before + 1)


def test_a_readers_mistake_is_raised_as_it_is(folder):
    with closing(open_readers(folder, 0, encode=encode_or_fail)) as stream, pytest.raises(UserError) as plain:
        while True:
            stream.next_step()
    with closing(open_readers(folder, 1, encode=encode_or_fail)) as stream:
        for _ in range(2):  # whoever asks again hears it again
            with pytest.raises(UserError) as caught:
                while True:
                    stream.next_step()
            assert str(caught.value) == str(plain.value)
    assert "row 77 is refused" in str(plain.value)


def test_a_state_that_misses_a_stream_is_refused(folder):
    with closing(open_readers(folder, 1)) as stream:
        stream.restore({"0": {}})
        with pytest.raises(UserError, match="not stream"):
            stream.next_step()


def test_a_killed_reader_is_said_and_nothing_hangs(folder):
    with closing(open_readers(folder, 2)) as stream:
        stream.next_step()
        os.kill(pids(stream)[1], signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(InfrastructureError, match=r"was killed \(SIGKILL\)"):
                while stream.next_step().num_bins:
                    pass


def test_readers_ignore_requests_to_stop_and_end_when_closed(folder):
    stream = open_readers(folder, 1)
    with closing(stream):
        stream.next_step()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pids(stream)[0], number)
        assert len(read(stream)) > 20
    assert not psutil.pid_exists(pids(stream)[0])


def test_a_stream_that_is_dropped_takes_its_readers_along(folder):
    stream = open_readers(folder, 1)
    stream.begin()
    pid = pids(stream)[0]
    del stream
    assert ends(pid)


def test_readers_end_with_a_rank_that_is_killed(folder, tmp_path):
    command = [
        sys.executable,
        str(RANK),
        str(folder / "recipe.json"),
        "0",
        "1",
        str(STREAMS),
        "-",
        str(tmp_path),
        "1",
        "2",
    ]
    rank = subprocess.Popen(command)
    try:
        while not (tmp_path / "0000-0.json").exists():
            assert rank.poll() is None
            time.sleep(0.02)
        readers = [child.pid for child in psutil.Process(rank.pid).children(recursive=True)]
    finally:
        rank.kill()
        rank.wait()
    assert len(readers) == 2
    for pid in readers:
        assert ends(pid)


def test_readers_import_no_torch(tmp_path):
    modules = "ftlaunch.distributed.data.reader_process, ftlaunch.distributed.row_encoder, ftlaunch.recipes.methods.sft"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers', 'ray', 'pandas'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(tmp_path), check=False).returncode == 0


def test_a_run_is_the_same_with_readers_of_any_number(tmp_path):
    runs = [
        train(
            recipe_for(tmp_path, name=f"with-{readers}", data={"reader_processes": readers}, train={"max_steps": 3}), 2
        )
        for readers in (0, 2)
    ]
    assert runs[0].losses == runs[1].losses
    assert runs[0].grad_norms == runs[1].grad_norms
    assert [set(step) for step in runs[0].steps] == [set(step) for step in runs[1].steps]


def test_a_large_block_is_read_once_for_all_processes_of_a_node(tmp_path):
    """One row group, as pandas writes it: of two ranks with two readers each every one serves a part of it."""
    rng, number = np.random.default_rng(0), 300
    texts = [f"{row} {length}" for row, length in enumerate(rng.integers(2, 20, number))]
    padding = [rng.bytes(LARGE_BYTES // number + 100) for _ in range(number)]
    pq.write_table(pa.table({"text": texts, "padding": padding}), tmp_path / "a.parquet")
    source = TrainSource(path=str(tmp_path / "a.parquet"), format="text")
    index = build_index([source], ["a"])
    recipe = Recipe(
        name="t", model=Model(path="m"), data=Data(train=(source,), sequence_length=32),
        train=Train(global_batch_size=STREAMS, num_epochs=2),
    )  # fmt: skip

    def read_all(node_key):
        ranks = [
            open_stream(
                index=index, recipe=recipe, world_rank=rank, world_size=2, streams=STREAMS, encode=encode,
                collate=lay_out, reader_processes=2, node_key=node_key,
            )
            for rank in range(2)
        ]  # fmt: skip
        with closing(ranks[0]), closing(ranks[1]):
            steps = [[rank.next_step() for rank in ranks] for _ in range(30)]
        return [[content(part) for part in step] for step in steps], sum(p.read_bytes for s in steps for p in s)

    shared, alone = read_all(str(tmp_path)), read_all(None)
    assert shared[0] == alone[0]
    assert index.num_blocks == 1
    assert (shared[1], alone[1]) == (index.block_bytes[0], 4 * index.block_bytes[0])
