"""Splitting, truncating and packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.distributed.data.pack import Address, PackBuffer, Waiting, cuts, fit, fit_together, next_bin, policy
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.base import Rejected, RowId, Sample

ROW = RowId("s", "f.jsonl", 4, 0)
POLICIES = ("split", "drop", "truncate_left", "truncate_right")


def sample(length, supervised=None):
    mask = np.ones(length, bool) if supervised is None else np.isin(np.arange(length), list(supervised))
    return Sample(np.arange(length, dtype=np.int32), mask, ROW)


@given(st.integers(2, 400), st.integers(8, 60))
def test_a_split_document_predicts_every_token_but_the_first_once(length, sequence_length):
    pieces = fit(sample(length), sequence_length, "split")
    predicted = [token for piece in pieces for token in piece.input_ids[1:].tolist()]
    assert predicted == list(range(1, length))
    assert all(len(piece) <= sequence_length for piece in pieces)
    assert all(len(piece) == sequence_length for piece in pieces[:-1])


@given(st.integers(2, 90), st.sets(st.integers(0, 89)), st.integers(8, 40), st.sampled_from(POLICIES))
def test_pieces_fit_and_have_something_to_learn(length, supervised, sequence_length, overlong):
    whole = sample(length, supervised)
    found = cuts(whole, sequence_length, overlong)
    if isinstance(found, Rejected):
        assert overlong != "split" or whole.num_targets == 0
        return
    assert found and all(0 <= start < stop <= length and stop - start <= sequence_length for start, stop in found)
    pieces = fit(whole, sequence_length, overlong)
    assert all(piece.num_targets for piece in pieces)
    if overlong == "split":
        assert sum(piece.num_targets for piece in pieces) == whole.num_targets


def test_what_becomes_of_an_overlong_sample():
    long = sample(20, supervised=range(15, 20))
    assert fit(long, 10, "drop").reason == "overlong"
    (left,) = fit(long, 10, "truncate_left")
    assert left.input_ids.tolist() == list(range(10, 20))
    assert left.num_targets == 5
    assert fit(long, 10, "truncate_right").reason == "no_targets_after_truncation"
    assert [piece.input_ids[0] for piece in fit(long, 10, "split")] == [9, 18], "the first piece teaches nothing"
    with pytest.raises(UserError, match=r"f\.jsonl, block 0, row 4: 20 tokens do not fit data.sequence_length 10"):
        fit(long, 10, "error")
    assert fit(sample(20), 20, "error")[0].num_targets == 19
    assert isinstance(fit(sample(5, supervised=[0]), 10, "split"), Rejected), "token 0 is never predicted"


def test_samples_that_belong_together_stay_together():
    pair = (sample(6), sample(12, supervised=range(4, 12)))
    assert fit_together(pair, 18, "drop") is pair
    assert fit_together(pair, 17, "drop").reason == fit_together(pair, 17, "split").reason == "overlong"
    left, right = fit_together(pair, 16, "truncate_right")
    assert left.input_ids.tolist() == list(range(6))
    assert right.input_ids.tolist() == list(range(8))
    assert fit_together(pair, 16, "truncate_left")[1].input_ids.tolist() == list(range(4, 12))
    assert fit_together(pair, 8, "truncate_right").reason == "no_targets_after_truncation"
    assert fit_together((sample(3, []), sample(3, [])), 10, "drop").reason == "no_targets"
    with pytest.raises(UserError, match="row 4: 18 tokens do not fit"):
        fit_together(pair, 17, "error")


def test_text_is_split_and_the_rest_dropped_unless_the_recipe_says_otherwise():
    assert [policy(None, "text"), policy(None, "chat"), policy(None, "prompt_completion")] == ["split", "drop", "drop"]
    assert policy("truncate_left", "text") == "truncate_left"


class Source:
    """Units of these lengths, taken into a buffer as it has room."""

    def __init__(self, lengths, buffer_size, buffer):
        self.waiting = [Waiting((), Address(0, number), length) for number, length in enumerate(lengths)][::-1]
        self.size, self.buffer = buffer_size, buffer
        self.bins, self.entered = [], {}

    def refill(self):
        while self.waiting and len(self.buffer) < self.size:
            self.buffer.add(self.waiting.pop())
            self.entered[len(self.entered)] = len(self.bins)


def pack_all(lengths, sequence_length, buffer_size):
    source = Source(lengths, buffer_size, PackBuffer())
    while chosen := next_bin(source.buffer, sequence_length, source.refill):
        source.bins.append([one.address.row for one in chosen])
    return source.bins, source.entered


@given(st.lists(st.integers(1, 32), max_size=60), st.integers(1, 8))
def test_bins_hold_every_unit_once_and_nothing_waits_longer_than_the_buffer(lengths, buffer_size):
    bins, entered = pack_all(lengths, 32, buffer_size)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 32 for rows in bins)
    for number, rows in enumerate(bins):
        assert all(number - entered[row] <= buffer_size for row in rows)


class ListBuffer(list):
    """The rule, written down as it is said."""

    add = list.append

    def pop_oldest(self):
        return self.pop(0)

    def pop_largest(self, room):
        fitting = [one for one in self if one.length <= room]
        best = max(fitting, key=lambda one: one.length, default=None)  # the first of equals
        return best and self.pop(self.index(best))


@given(st.lists(st.integers(1, 12) | st.integers(1, 64), max_size=200), st.integers(1, 70))
def test_the_choice_is_the_one_that_looking_at_all_would_make(lengths, buffer_size):
    """Runs on disk depend on it."""
    source = Source(lengths, buffer_size, ListBuffer())
    while chosen := next_bin(source.buffer, 64, source.refill):
        source.bins.append([one.address.row for one in chosen])
    assert pack_all(lengths, 64, buffer_size) == (source.bins, source.entered)


def test_the_oldest_comes_first_and_then_the_largest_that_fits():
    assert pack_all([10, 3, 20, 22, 22], 32, 5)[0] == [[0, 3], [1, 4], [2]]


def test_packing_fills_log_normal_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 60_000).astype(int), 8, 4096).tolist()
    bins, _ = pack_all(lengths, 4096, 64)
    assert sum(lengths) / (4096 * len(bins)) > 0.998
