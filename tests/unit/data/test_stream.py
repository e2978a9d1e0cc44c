"""The stream's guarantees, through real files. Row identity is read back from token ids of collated batches."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from contextlib import closing
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import KINDS, Case, Run, Source, collate, encode, make_case, rows_in, run_to_end, sum_counters, write

from ftlaunch.distributed.data import feed, order
from ftlaunch.distributed.data import stream as stream_module
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.evaluation import EvalBatches
from ftlaunch.distributed.data.held_out import held_out
from ftlaunch.distributed.data.share import share_of
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.base import IGNORED
from ftlaunch.recipes.schema import Data, EvalSplit, Model, Recipe, Train

lengths = st.lists(st.integers(1, 20), min_size=0, max_size=14)
files = st.lists(lengths, min_size=1, max_size=4).filter(any)
kinds = st.sampled_from([*KINDS, "mixed"])
slow = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def non_empty(groups):
    return [group for group in groups if group]


@slow
@given(files, kinds, st.integers(1, 6), st.integers(1, 5), st.integers(1, 2), st.integers(1, 3), st.data())
def test_every_row_is_served_once_an_epoch_and_progress_adds_up(groups, kind, streams, world, per, epochs, data):
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(
            folder, [Source(non_empty(groups), kind)], streams=streams, bins_per_stream=per,
            train={"num_epochs": epochs, "micro_batch_size": data.draw(st.integers(1, 3))},
            data={"packing": data.draw(st.booleans()), "sequence_length": 32, "shuffle": data.draw(st.booleans())},
        )  # fmt: skip
        steps, served = run_to_end(run := Run(case, world))
        flat = [length for group in groups for length in group]
        assert rows_in(steps) == {i: (length + 1) * epochs for i, length in enumerate(flat)}
        assert served == run.streams[0].total_bytes


@slow
@given(files, kinds, st.sampled_from([2, 4, 6]), st.integers(1, 2), st.integers(0, 10))
def test_the_global_batch_is_the_same_at_every_world_size(groups, kind, streams, per, seed):
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(
            folder, [Source(non_empty(groups), kind)], streams=streams, bins_per_stream=per, train={"seed": seed}
        )
        worlds = [w for w in (1, 2, 3, 4, 5, 6, 8, 12) if w <= streams or per > 1]
        results = [run_to_end(Run(case, world)) for world in worlds]
        assert all(result == results[0] for result in results)


@slow
@given(
    st.lists(files, min_size=1, max_size=3), kinds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 5),
    st.integers(0, 6), st.booleans(), st.booleans(), st.integers(0, 5),
)  # fmt: skip
def test_going_on_equals_not_having_stopped(sources, kind, streams, before, after, stop_at, mixed, repeat, seed):
    weights = [0.5, 0.3, 0.2] if mixed else [None] * 3
    made = [Source(non_empty(groups), kind, weight) for groups, weight in zip(sources, weights, strict=False)]
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(
            folder, made, streams=streams, train={"num_epochs": 2, "seed": seed}, data={"sequence_length": 8}
        )
        if mixed and not repeat:
            changed = tuple(s.model_copy(update={"repeat": False}) for s in case.recipe.data.train)
            data = case.recipe.data.model_copy(update={"train": changed})
            case = case._replace(recipe=case.recipe.model_copy(update={"data": data}))
        whole, whole_served = run_to_end(whole_run := Run(case, 1))
        first = Run(case, before)
        head = [first.step() for _ in range(stop_at)]
        states = first.states()
        first.close()
        tail, tail_served = run_to_end(second := Run(case, after, states))
        assert [bins for bins, _, _ in head if bins] + tail == whole
        assert sum(served for _, served, _ in head) + tail_served == whole_served
        assert all(served >= 0 for _, served, _ in head)
        assert all(len(json.dumps(state)) < 2000 for state in states.values())
        assert second.states().keys() == {str(s) for s in range(streams)}
        assert sum_counters(second) == sum_counters(whole_run)


@slow
@given(st.integers(1, 3), st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 40))
def test_each_source_keeps_its_share_within_one_draw(streams, weights, steps):
    with tempfile.TemporaryDirectory() as folder:
        made = [Source([[1] * 7, [1] * 5], "jsonl", weight / 10) for weight in weights]
        case = make_case(
            folder, made, streams=streams, train={"max_steps": steps}, data={"packing": False, "sequence_length": 8}
        )
        run = Run(case, 1)
        counts = [Counter() for _ in range(streams)]
        for number in range(1, steps + 1):
            _, _, (step,) = run.step()
            for micro in step.micro_batches:
                row = int(micro.batch.input_ids[0, 0])
                counts[micro.first_bin][next(i for i, ids in enumerate(case.ids) if row in ids)] += 1
            for count in counts:
                for source, weight in enumerate(weights):
                    assert abs(count[source] - Fraction(number * weight, sum(weights))) < 1
        run.close()


def test_bins_lie_where_their_number_says(tmp_path):
    case = make_case(tmp_path, [Source([[1] * 40], "jsonl")], streams=4, bins_per_stream=2, data={"packing": False})
    seen = {}
    for world in (1, 2, 4, 8):
        run = Run(case, world)
        placed = {}
        for step in run.step()[2]:
            for micro in step.micro_batches:
                placed[micro.first_bin] = int(micro.batch.input_ids[0, 0])
        seen[world] = placed
        run.close()
    assert seen[1] == seen[2] == seen[4] == seen[8]
    assert sorted(seen[1]) == list(range(8))


def test_bins_of_a_stream_share_a_micro_batch_at_any_world_size(tmp_path):
    case = make_case(
        tmp_path, [Source([[1] * 64], "jsonl")], streams=4, bins_per_stream=2, train={"micro_batch_size": 2},
        data={"packing": False},
    )  # fmt: skip
    groups = []
    for world in (1, 2, 4):
        run = Run(case, world)
        micros = [micro for step in run.step()[2] for micro in step.micro_batches]
        groups.append({micro.first_bin: micro.batch.input_ids[:, 0].tolist() for micro in micros})
        run.close()
    assert groups[0] == groups[1] == groups[2]


@slow
@given(
    files, kinds, st.sampled_from([2, 4, 6]), st.integers(1, 2), st.integers(1, 3), st.integers(2, 5), st.integers(1, 4)
)  # fmt: skip
def test_any_number_of_readers_makes_the_same_steps(groups, kind, streams, per, micro, readers, world):
    """Readers in threads here; that processes do the same is shown with few of them."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(stream_module, "ProcessFeed", feed.ThreadFeed):
        case = make_case(
            folder, [Source(non_empty(groups), kind)], streams=streams, bins_per_stream=per,
            train={"micro_batch_size": micro},
        )  # fmt: skip
        for rank in range(min(world, streams)):
            with closing(case.open(rank, world)) as one, closing(case.open(rank, world, readers)) as many:
                num_bins = 1
                while num_bins:
                    expected, step = one.next_step(), many.next_step()
                    num_bins = expected.num_bins
                    assert many.state() == one.state()
                    assert step.counters == expected.counters
                    assert (step.num_bins, step.num_tokens) == (expected.num_bins, expected.num_tokens)
                    assert step.served_bytes == expected.served_bytes
                    assert [micro.first_bin for micro in step.micro_batches] == [
                        micro.first_bin for micro in expected.micro_batches
                    ]
                    for made, wanted in zip(step.micro_batches, expected.micro_batches, strict=True):
                        assert np.array_equal(made.batch.input_ids, wanted.batch.input_ids)
                        assert made.batch.rows == wanted.batch.rows


@pytest.mark.parametrize("world", [3, 5, 7])
def test_ranks_that_do_not_divide_the_batch_get_empty_bins(tmp_path, world):
    case = make_case(tmp_path, [Source([[4] * 30], "jsonl")], streams=4, bins_per_stream=2, data={"packing": False})
    run = Run(case, world)
    bins, _, steps = run.step()
    assert len(bins) == 8
    assert sum(step.num_bins for step in steps) == 8
    for step in steps:
        for micro in step.micro_batches:
            if micro.first_bin == 8:
                assert (micro.batch.targets == IGNORED).all()
                assert micro.batch.num_tokens == 0
    run.close()


def test_processes_read_where_a_rank_has_cores_to_spare():
    assert [stream_module.usual_readers(cores, on_gpu=True) for cores in (1, 3, 4, 8, 64)] == [0, 0, 1, 2, 2]
    assert stream_module.usual_readers(64, on_gpu=False) == 0


def test_every_bin_has_one_owner():
    for streams in (1, 2, 4, 8):
        for per in (1, 2, 3):
            for world in range(1, 20):
                owned = Counter()
                for rank in range(world):
                    share = share_of(rank, world, streams, streams * per, 2)
                    mine = [(s, j) for s in share.streams for j in range(per) if j % share.sharers == share.place]
                    assert len(mine) <= share.micro_batches * 2
                    owned.update(mine)
                assert owned == {(s, j): 1 for s in range(streams) for j in range(per)}
    with pytest.raises(UserError, match="must divide"):
        share_of(0, 1, 3, 8, 1)


def test_rows_that_teach_nothing_are_counted_and_named(tmp_path):
    case = make_case(tmp_path, [Source([[3, 0, 2, 0, 5]], "parquet")], streams=1)
    run = Run(case, 1)
    _, _, (step,) = run.step()
    assert step.counters["s0"]["rejected/empty"] == 2
    assert step.counters["s0"]["rows"] == 5
    assert step.counters["s0"]["tokens"] == 13
    assert sorted(row.row for row, _ in step.rejections) == [1, 3]
    assert all(row.source == "s0" and row.file.endswith("0.parquet") for row, _ in step.rejections)
    run.close()


@pytest.mark.parametrize("train", [{"max_steps": 5}, {"num_epochs": 1}])
def test_data_that_is_all_refused_ends_instead_of_spinning(tmp_path, train):
    case = make_case(tmp_path, [Source([[0] * 9], "jsonl")], streams=2, train=train)
    assert run_to_end(Run(case, 1))[0] == []


def test_fewer_rows_than_streams_still_reach_every_step(tmp_path):
    case = make_case(
        tmp_path, [Source([[1, 1, 1]], "parquet")], streams=8, train={"max_steps": 6}, data={"packing": False}
    )
    run = Run(case, 2)
    counts = Counter()
    for _ in range(24):
        bins, _, _ = run.step()
        assert len(bins) == 8
        counts.update(tokens[0] for tokens in bins)
    run.close()
    assert max(counts.values()) - min(counts.values()) <= 24


def test_a_finished_run_goes_on_when_it_gets_more_epochs(tmp_path):
    case = make_case(tmp_path, [Source([[1] * 20], "jsonl")], streams=2, data={"packing": False})
    first = Run(case, 1)
    once, _ = run_to_end(first)
    train = Train(num_epochs=2, global_batch_size=2, seed=3)
    longer = case._replace(recipe=case.recipe.model_copy(update={"train": train}))
    more, more_served = run_to_end(Run(longer, 2, first.states()))
    assert rows_in(more) == rows_in(once)
    assert 2 * more_served == run_to_end(Run(longer, 1))[1]


def test_stopping_inside_a_long_document_keeps_its_place_and_its_progress(tmp_path):
    case = make_case(tmp_path, [Source([[3, 150, 3, 90]], "jsonl")], streams=1, data={"sequence_length": 8})
    whole, whole_served = run_to_end(Run(case, 1))
    bins, served, states = [], [], None
    for _ in range(len(whole) + 1):
        run = Run(case, 1, states)
        now, bytes_now, _ = run.step()
        bins.append(now)
        served.append(bytes_now)
        states = run.states()
        run.close()
    assert bins[:-1] == whole
    assert min(served) >= 0
    assert sum(served) == whole_served


def test_an_error_in_the_background_reaches_the_loop(tmp_path):
    case = make_case(tmp_path, [Source([[1, 2]], "jsonl")], streams=1)
    (tmp_path / "s0" / "0.jsonl").write_text('{"text": "0 1"}\n{"text": "1 x"}\n')
    index = build_index(case.recipe.data.train, ["s0"])
    stream = case._replace(index=index).open()
    with pytest.raises(UserError, match=r"s0: .*0\.jsonl, line 2: invalid literal"):
        stream.next_step()
    with pytest.raises(UserError, match="line 2"):
        stream.next_step()
    stream.close()


def test_a_shuffled_epoch_differs_from_the_next_and_unshuffled_ones_are_in_file_order(tmp_path):
    for shuffle in (True, False):
        folder = tmp_path / str(shuffle)
        folder.mkdir()
        case = make_case(
            folder, [Source([[1] * 30, [1] * 30], "jsonl")], streams=1, train={"num_epochs": 2},
            data={"packing": False, "shuffle": shuffle},
        )  # fmt: skip
        steps, _ = run_to_end(Run(case, 1))
        first, second = [b[0][0] for b in steps[:60]], [b[0][0] for b in steps[60:]]
        assert sorted(first) == sorted(second) == list(range(60))
        assert (first == second == list(range(60))) is not shuffle


def test_windows_shuffle_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "WINDOW_BYTES", 200)
    case = make_case(tmp_path, [Source([[1] * 50] * 3, "jsonl")], streams=2)
    steps, served = run_to_end(Run(case, 1))
    assert rows_in(steps) == dict.fromkeys(range(150), 2)
    assert served == case.index.block_bytes.sum()


@slow
@given(files, kinds, st.integers(1, 5), st.integers(1, 3))
def test_evaluation_reads_every_row_once_in_file_order(groups, kind, world, micro):
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(folder, [Source(non_empty(groups), kind)], streams=1)
        seen = []
        for rank in range(world):
            batches = EvalBatches(
                case.index, data=case.recipe.data.model_copy(update={"packing": False}), world_rank=rank,
                world_size=world, micro_batch_size=micro, encode=encode, collate=collate,
                source=case.recipe.data.train[0],
            )  # fmt: skip
            for batch, _ in batches:
                seen += [int(row[0]) for row in batch.input_ids if row[0] >= 0]
        assert list(dict.fromkeys(seen)) == list(range(len(case.ids[0])))


def test_a_held_out_fraction_is_disjoint_and_complete(tmp_path):
    recipes, ids = write(tmp_path, [Source([[2] * 300], "parquet")])
    index = build_index(recipes, ["s0"])
    data = Data(train=recipes, eval=EvalSplit(fraction=0.2), sequence_length=16)
    recipe = Recipe(name="t", model=Model(path="m"), data=data, train=Train(global_batch_size=2))
    train = set(rows_in(run_to_end(Run(Case(index, recipe, 2, ids), 2))[0]))
    batches = EvalBatches(
        index, data=data, world_rank=0, world_size=1, micro_batch_size=2, encode=encode, collate=collate,
        source=recipes[0],
        held_out_fraction=0.2,
    )  # fmt: skip
    held = {int(t) for batch, _ in batches for t in batch.input_ids.flat if t >= 0}
    assert train | held == ids[0]
    assert not train & held
    assert 30 < len(held) < 90
    assert batches.counters["s0"]["rows"] == len(held)


def test_the_held_out_side_of_a_row_is_the_same_for_ever():
    assert [held_out({"text": str(i)}, 0.3) for i in range(12)] == HELD_OUT
    row = {"messages": [{"role": "user", "content": "hi", "name": None}], "tools": None}
    assert held_out(row, 0.5) == held_out({"messages": [{"content": "hi", "role": "user"}]}, 0.5)


HELD_OUT = [False, False, False, False, False, True, False, False, False, True, True, False]
