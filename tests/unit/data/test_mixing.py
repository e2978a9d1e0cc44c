"""Sources with passes of their own, changed weights, long rows: exact at any world size, through real files."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import KINDS, NOWHERE, Run, Source, encode, make_case, rows_in, run_to_end, sum_counters

from ftlaunch.distributed.data.lane_plan import plan_lanes
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.base import Sample

rows = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=12), min_size=1, max_size=3)
UNPACKED = {"packing": False, "sequence_length": 32}
slow = settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def with_sources(case, **changes):
    """The case with other keys in all its sources."""
    return with_data(case, train=tuple(source.model_copy(update=changes) for source in case.recipe.data.train))


def with_data(case, **changes):
    data = case.recipe.data.model_copy(update=changes)
    return case._replace(recipe=case.recipe.model_copy(update={"data": data}))


def reweighted(case, *weights):
    sources = zip(case.recipe.data.train, weights, strict=True)
    return with_data(case, train=tuple(source.model_copy(update={"weight": weight}) for source, weight in sources))


@slow
@given(rows, rows, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_every_source_is_served_as_often_as_it_says(first, second, passes, epochs, streams, world, seed):
    sources = [Source(first, "mixed", keys={"num_epochs": passes}), Source(second, "mixed")]
    with tempfile.TemporaryDirectory() as folder:
        train = {"num_epochs": epochs, "seed": seed}
        case = make_case(folder, sources, streams=streams, train=train, data={"sequence_length": 32})
        steps, served = run_to_end(run := Run(case, world))
        times = [passes if row in case.ids[0] else epochs for row in range(sum(map(len, case.ids)))]
        flat = [length for group in first + second for length in group]
        assert rows_in(steps) == {row: (flat[row] + 1) * times[row] for row in range(len(flat))}
        assert served == run.streams[0].total_bytes


@slow
@given(
    rows, st.decimals("0.1", "3", places=1), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9),
    st.booleans(),
)  # fmt: skip
def test_a_part_of_a_pass_is_that_part_of_the_rows(groups, passes, streams, before, after, stop_at, weighted):
    """Each stream serves the part of its bytes; no row comes by more often than another by more than once."""
    weights = (0.5, 0.5) if weighted else (None, None)
    keys = [{}, {"num_epochs": float(passes)}]
    sources = [Source(groups, "jsonl", weight, key) for weight, key in zip(weights, keys, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(folder, sources, streams=streams, train={"num_epochs": 4}, data=UNPACKED)
        whole, served = run_to_end(run := Run(case, 1))
        assert served == run.streams[0].total_bytes
        first = Run(case, before)
        head = [first.step()[0] for _ in range(stop_at)]
        states = first.states()
        first.close()
        tail, _ = run_to_end(run := Run(case, after, states))
        assert [bins for bins in head if bins] + tail == whole
        seen = Counter(bins[0] for step in whole for bins in step)
        times = [seen[row] for row in sorted(case.ids[1])]
        assert all(seen[row] == 4 for row in case.ids[0])
        assert max(times) <= math.ceil(passes)
        if any("r1" in state["draws"] for state in run.states().values()):
            assert weighted, "the primary source may end before the other one has"
            return
        assert min(times) >= math.floor(passes)
        order = plan_lanes(case.index, case.recipe.data, case.recipe.train, streams)[1].order
        most = max(order.block_bytes(block) for block in range(len(order._block_bytes)))
        # A stream stops at the row that reaches its bytes; a window counts bytes evenly over its rows.
        assert abs(sum(times) - float(passes) * len(times)) <= streams * (1 + most / order.nbytes * len(times))


def test_half_a_pass_over_many_rows_is_half_of_them(tmp_path):
    sources = [Source([[1] * 200], "parquet", keys={"num_epochs": 0.5}), Source([[1] * 20], "jsonl")]
    case = make_case(tmp_path, sources, streams=2)
    seen = rows_in(run_to_end(Run(case, 2))[0])
    assert abs(sum(row in seen for row in range(200)) - 100) <= 2
    assert all(row in seen for row in range(200, 220))


def test_sources_with_passes_of_their_own_end_together(tmp_path):
    sources = [Source([[1] * 30], "parquet", keys={"num_epochs": 5}), Source([[1] * 300], "parquet")]
    case = make_case(tmp_path, sources, streams=1, data={"packing": False})
    steps, _ = run_to_end(Run(case, 1))
    of_first = [step[0][0] < 30 for step in steps]
    assert sum(of_first) == 150 and len(of_first) == 450
    for start in range(0, 450, 90):
        assert 20 <= sum(of_first[start : start + 90]) <= 40, "a third, all along"


@slow
@given(rows, rows, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(1, 9))
def test_changed_weights_hold_from_the_step_on_at_which_a_run_goes_on(
    first, second, streams, before, after, stop_at, weight
):
    """No row is lost or repeated; shares follow the new weights within one draw."""
    made = [Source(first, "jsonl", 0.5), Source(second, "mixed", 0.5)]
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(folder, made, streams=streams, train={"max_steps": 99}, data=UNPACKED)
        run = Run(case, before)
        seen = [run.step()[2] for _ in range(stop_at)]
        states = run.states()
        run.close()
        changed = reweighted(case, weight / 10, 1 - weight / 10)
        run = Run(changed, after, states)
        then = [run.step()[2] for _ in range(40)]
        run.close()
        orders = [rows_of_streams(case, steps) for steps in (seen, then)]
        for stream in range(streams):
            for source, ids in enumerate(case.ids):
                served = [row for order in orders for row in order[stream] if row in ids]
                assert served == alone(case, source, stream, len(served)), "goes on where it was"
            share = Fraction(weight, 10)
            for number in range(1, len(orders[1][stream]) + 1):
                drawn = sum(row in case.ids[0] for row in orders[1][stream][:number])
                # One row of each stream was drawn under the old weights and waited.
                assert abs(drawn - number * share) < 2


def rows_of_streams(case, steps):
    """Stream -> the rows it served, one a bin."""
    found = [[] for _ in range(case.streams)]
    for step in steps:
        for micro in (micro for rank in step for micro in rank.micro_batches):
            if micro.first_bin < case.streams and micro.batch.num_tokens:
                found[micro.first_bin].append(int(micro.batch.input_ids[0, 0]))
    return found


def alone(case, source, stream, number):
    """The first rows that a stream serves of a source, whatever the weights."""
    weights = [1e-6, 1e-6]
    weights[source] = 1.0
    sources = [
        each.model_copy(update={"primary": place == source}) for place, each in enumerate(case.recipe.data.train)
    ]
    run = Run(reweighted(with_data(case, train=tuple(sources)), *weights), 1)
    found = []
    while len(found) < number:
        (step,) = run.step()[2]
        found += [row for row in rows_of_streams(case, [[step]])[stream] if row in case.ids[source]]
    run.close()
    return found


def test_a_state_of_other_lanes_is_refused(tmp_path):
    case = make_case(tmp_path, [Source([[1] * 9], "jsonl"), Source([[1] * 9], "jsonl")], streams=1)
    run = Run(case, 1)
    run.step()
    states = run.states()
    run.close()
    with pytest.raises(UserError, match="lanes \\*; this run has version 3 with s0, r1"):
        Run(reweighted(case, 0.5, 0.5), 1, states).step()


@pytest.mark.parametrize(
    ("overlong", "tokens", "counts"),
    [
        ("split", {0: 4, 1: 24, 2: 16}, {"split": 1}),
        ("truncate_left", {0: 4, 1: 16, 2: 16}, {"truncated": 1, "lost_tokens": 5}),
        ("truncate_right", {0: 4, 1: 16, 2: 16}, {"truncated": 1, "lost_tokens": 5}),
        ("drop", {0: 4, 2: 16}, {"rejected/overlong": 1, "lost_tokens": 21}),
    ],
)
@pytest.mark.parametrize("per_source", [True, False])
def test_long_rows_become_what_the_recipe_says(tmp_path, overlong, tokens, counts, per_source):
    case = make_case(tmp_path, [Source([[3, 20, 15]], "jsonl")], streams=1)
    case = with_sources(case, overlong=overlong) if per_source else with_data(case, overlong=overlong)
    case = case if not per_source else with_data(case, overlong="error")
    steps, _ = run_to_end(run := Run(case, 1))
    assert rows_in(steps) == {row: number + (overlong == "split" and row == 1 and -2) for row, number in tokens.items()}
    found = {name: number for (_, name), number in sum_counters(run).items()}
    assert {name: found.get(name) for name in counts} == counts
    assert found["rows"] == 3 and found["tokens"] == sum(rows_in(steps).values())


def test_a_long_row_can_be_an_error(tmp_path):
    case = with_data(make_case(tmp_path, [Source([[3, 20]], "jsonl")], streams=1), overlong="error")
    with pytest.raises(UserError, match=r"21 tokens do not fit data\.sequence_length 16"):
        run_to_end(Run(case, 1))


def pair(row, row_format):
    """A row as two samples that belong together."""
    sample = encode(row, row_format)
    half = len(sample) // 2
    return tuple(Sample(part, np.ones(len(part), bool), NOWHERE) for part in np.split(sample.input_ids, [half]))


@slow
@given(st.lists(st.lists(st.integers(3, 19), min_size=1, max_size=12), min_size=1, max_size=3), st.integers(0, 5))
def test_pairs_share_a_sequence_also_when_a_run_goes_on(groups, stop_at):
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(folder, [Source(groups, "mixed")], streams=2)._replace(encode=pair)
        whole, _ = run_to_end(run := Run(case, 1))
        flat = [length for group in groups for length in group]
        fits = {row: length + 1 for row, length in enumerate(flat) if length + 1 <= 16}
        assert rows_in(whole) == fits
        for bins in whole:
            for tokens in bins:
                assert all(Counter(tokens)[row] == fits[row] for row in set(tokens)), "torn apart"
        assert sum_counters(run)["s0", "samples"] == 2 * len(fits)
        first = Run(case, 2)
        head = [first.step()[0] for _ in range(stop_at)]
        states = first.states()
        first.close()
        assert [bins for bins in head if bins] + run_to_end(Run(case, 1, states))[0] == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_range_of_rows_is_served_once_at_any_world_size(tmp_path, kind, world):
    sources = [Source([[2] * 20, [2] * 30], kind, keys={"skip": 7, "take": 25})]
    case = make_case(tmp_path, sources, streams=3)
    steps, served = run_to_end(run := Run(case, world))
    assert rows_in(steps) == dict.fromkeys(range(7, 32), 3)
    assert served == run.streams[0].total_bytes


@slow
@given(rows, st.integers(2, 20), st.integers(2, 20), st.integers(0, 6))
def test_a_changed_sequence_length_loses_no_token_of_waiting_rows(groups, before, after, stop_at):
    """Text is split: every predicted token comes by once, whatever it waited as."""
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(folder, [Source(groups, "jsonl")], streams=1, data={"sequence_length": 6 + before})
        run = Run(case, 1)
        predicted = Counter()
        for _ in range(stop_at):
            predicted.update(targets(run.step()[2]))
        states = run.states()
        run.close()
        run = Run(with_data(case, sequence_length=6 + after), 1, states)
        while (step := run.step())[0]:
            predicted.update(targets(step[2]))
        run.close()
        flat = [length for group in groups for length in group]
        assert predicted == dict(enumerate(flat))


def targets(steps):
    return [int(t) for step in steps for micro in step.micro_batches for t in micro.batch.targets.flat if t >= 0]


@slow
@given(rows, st.integers(1, 3), st.sampled_from([1, 4, 64]), st.integers(0, 3))
def test_a_state_is_small_and_counters_are_of_what_was_handed_out(groups, streams, buffer, stop_at):
    with tempfile.TemporaryDirectory() as folder:
        data = {"pack_buffer": buffer, "sequence_length": 32}
        case = make_case(
            folder, [Source(groups, "mixed", 0.9), Source(groups, "jsonl", 0.1)], streams=streams, data=data
        )
        run = Run(case, 1)
        handed_out = Counter()
        for _ in range(stop_at + 1):
            (step,) = run.step()[2]
            for micro in step.micro_batches:
                handed_out.update(int(t) for t in micro.batch.input_ids.flat if t >= 0)
            counted = {name: numbers.get("tokens", 0) for name, numbers in step.counters.items()}
            by_source = [sum(handed_out[row] for row in ids) for ids in case.ids]
            assert [counted.get(name, 0) for name in ("s0", "r1")] == by_source
        for state in run.states().values():
            assert len(json.dumps(state)) < 900 + 30 * buffer, "a few hundred bytes, and an address a waiting sample"
        run.close()
