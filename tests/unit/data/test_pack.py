"""Splitting, truncating and packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.distributed.data.pack import Address, Waiting, fit, next_bin
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.base import Rejected, RowId, Sample

ROW = RowId("s", "f.jsonl", 4, 0)


def sample(length, supervised=None):
    mask = np.ones(length, bool) if supervised is None else np.isin(np.arange(length), list(supervised))
    return Sample(np.arange(length, dtype=np.int32), mask, ROW)


@given(st.integers(2, 400), st.integers(8, 60))
def test_a_split_document_predicts_every_token_but_the_first_once(length, sequence_length):
    pieces = fit(sample(length), sequence_length, "drop", splittable=True)
    predicted = [token for piece in pieces for token in piece.input_ids[1:].tolist()]
    assert predicted == list(range(1, length))
    assert all(len(piece) <= sequence_length for piece in pieces)
    assert all(len(piece) == sequence_length for piece in pieces[:-1])


def test_what_becomes_of_an_overlong_sample():
    long = sample(20, supervised=range(15, 20))
    assert fit(long, 10, "drop", False).reason == "overlong"
    (left,) = fit(long, 10, "truncate_left", False)
    assert left.input_ids.tolist() == list(range(10, 20))
    assert left.num_targets == 5
    assert fit(long, 10, "truncate_right", False).reason == "no_targets_after_truncation"
    with pytest.raises(UserError, match=r"f\.jsonl, block 0, row 4: 20 tokens do not fit data.sequence_length 10"):
        fit(long, 10, "error", False)
    assert fit(sample(20), 20, "error", False)[0].num_targets == 19
    assert isinstance(fit(sample(5, supervised=[0]), 10, "drop", True), Rejected), "token 0 is never predicted"


def pack_all(lengths, sequence_length, buffer_size):
    waiting = [Waiting(sample(length), Address(0, number, 0), length) for number, length in enumerate(lengths)]
    buffer, bins, entered = [], [], {}

    def refill():
        while waiting and len(buffer) < buffer_size:
            buffer.append(waiting.pop(0))
            entered[buffer[-1].address.row] = len(bins)

    while chosen := next_bin(buffer, sequence_length, refill):
        bins.append([one.address.row for one in chosen])
    return bins, entered


@given(st.lists(st.integers(1, 32), max_size=60), st.integers(1, 8))
def test_bins_hold_every_sample_once_and_nothing_waits_longer_than_the_buffer(lengths, buffer_size):
    bins, entered = pack_all(lengths, 32, buffer_size)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 32 for rows in bins)
    for number, rows in enumerate(bins):
        assert all(number - entered[row] <= buffer_size for row in rows)


def test_the_oldest_comes_first_and_then_the_largest_that_fits():
    assert pack_all([10, 3, 20, 22, 22], 32, 5)[0] == [[0, 3], [1, 4], [2]]


def test_packing_fills_log_normal_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 6000).astype(int), 8, 4096).tolist()
    bins, _ = pack_all(lengths, 4096, 64)
    assert sum(lengths) / (4096 * len(bins)) > 0.995
