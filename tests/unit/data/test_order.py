"""The order function: bijections, exact cuts, exact proportions."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlaunch.distributed.data import order
from ftlaunch.distributed.data.order import LaneOrder, integer_weights, next_lane, permute, slice_rows

keys = st.integers(0, 2**64 - 1)


@given(st.integers(1, 3000), keys)
def test_the_permutation_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(st.integers(1, 2**62), keys, st.data())
def test_one_element_costs_no_table_and_stays_in_range(size, key, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    images = permute(indices, size, key)
    assert len(set(images.tolist())) == len(indices)
    assert all(0 <= image < size for image in images.tolist())
    assert permute(indices[0], size, key)[0] == images[0]


def test_permutations_of_other_keys_differ_and_look_uniform():
    size, trials = 5, 4000
    hits = np.zeros((size, size))
    for key in range(trials):
        hits[np.arange(size), permute(np.arange(size), size, order.derive_key(key, "test"))] += 1
    expected = trials / size
    chi_square = ((hits - expected) ** 2 / expected).sum()
    assert chi_square < 45  # 16 degrees of freedom: p < 2e-4 for a fair shuffle, with fixed keys it never flickers


def test_the_order_is_frozen():
    """Runs on disk depend on these numbers."""
    assert permute(np.arange(8), 8, order.derive_key(0, "blocks", "", 0)).tolist() == FROZEN_PERMUTATION
    lane = LaneOrder("a", np.array([10, 20, 30]), streams=2, seed=1, shuffle=True)
    assert [tuple(lane.segment(0, 0)[i]) for i in range(len(lane.segment(0, 0)))] == FROZEN_SEGMENT
    assert lane.window_order(0, 0, 0, 5).tolist() == FROZEN_WINDOW


FROZEN_PERMUTATION = [3, 5, 4, 1, 6, 7, 0, 2]
FROZEN_SEGMENT = [(2, 0, 30)]
FROZEN_WINDOW = [3, 1, 4, 0, 2]

blocks = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30)), min_size=1, max_size=12)


@settings(deadline=None)
@given(blocks, st.integers(1, 9), st.integers(0, 3), st.integers(0, 5), st.booleans())
def test_every_row_is_in_exactly_one_segment(sizes, streams, epoch, seed, shuffle):
    nbytes = np.array([size for size, _ in sizes])
    lane = LaneOrder("x", nbytes, streams=streams, seed=seed, shuffle=shuffle)
    served = []
    for stream in range(streams):
        segment = lane.segment(stream, epoch)
        slices = [segment[i] for i in range(len(segment))]
        assert all(piece.nbytes > 0 for piece in slices)
        assert sum(piece.nbytes for piece in slices) == segment.nbytes == lane.segment_bytes(stream, epoch)
        assert [segment.bytes_before(i) for i in range(len(slices) + 1)] == [
            sum(piece.nbytes for piece in slices[:i]) for i in range(len(slices) + 1)
        ]
        assert abs(segment.nbytes - lane.nbytes / streams) <= 1
        served += [
            (piece.block, row)
            for piece in slices
            for row in slice_rows(piece, sizes[piece.block][0], sizes[piece.block][1])
        ]
    assert sorted(served) == [(block, row) for block, (_, rows) in enumerate(sizes) for row in range(rows)]


def test_windows_cover_a_segment_in_order(monkeypatch):
    monkeypatch.setattr(order, "WINDOW_BYTES", 25)
    lane = LaneOrder("x", np.full(10, 10), streams=1, seed=0, shuffle=True)
    segment = lane.segment(0, 1)
    windows = list(segment.windows(0))
    assert [len(window) for window in windows] == [3, 3, 3, 1]
    assert list(chain(*windows)) == [segment[i] for i in range(10)]
    assert sorted(lane.window_order(0, 0, 0, 7).tolist()) == list(range(7))
    assert lane.window_order(0, 0, 0, 50).tolist() != lane.window_order(0, 1, 0, 50).tolist()


def test_windows_of_the_first_epoch_are_small_at_its_ends(monkeypatch):
    monkeypatch.setattr(order, "WINDOW_BYTES", 80)
    lane = LaneOrder("x", np.full(60, 10), streams=1, seed=0, shuffle=True)
    first, second = lane.segment(0, 0), lane.segment(0, 1)
    grown = [1, 1, 2, 4, 8]
    assert [len(window) for window in first.windows(0)] == [*grown, 8, 8, 8, 8, 6, 3, 2, 1]
    assert [len(window) for window in second.windows(0)] == [8] * 7 + [4]


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 100), st.integers(0, 2))
def test_a_window_depends_on_where_it_starts_and_on_nothing_else(sizes, streams, most, epoch):
    """So that a position goes on where it was, and every slice is in one window."""
    lane = LaneOrder("x", np.array(sizes), streams=streams, seed=1, shuffle=True)
    for stream in range(streams):
        with mock.patch.object(order, "WINDOW_BYTES", most):
            segment = lane.segment(stream, epoch)
            windows = list(segment.windows(0))
            assert list(chain(*windows)) == [segment[i] for i in range(len(segment))]
            first = 0
            for window in windows:
                assert lane.segment(stream, epoch).window(first) == window
                assert sum(piece.nbytes for piece in window[:-1]) < most
                first += len(window)
            assert epoch or not windows or len(windows[0]) == 1


@given(st.lists(st.decimals("0.01", "50", places=2), min_size=1, max_size=6), st.integers(1, 400))
def test_every_lane_stays_within_one_draw_of_its_share(weights, draws):
    whole = integer_weights([float(weight) for weight in weights])
    shares = [Fraction(weight, sum(whole)) for weight in whole]
    assert shares == [Fraction(weight) / Fraction(sum(weights)) for weight in weights]
    counts = [0] * len(whole)
    for number in range(1, draws + 1):
        counts[next_lane(whole, counts)] += 1
        assert all(abs(count - number * share) < 1 for count, share in zip(counts, shares, strict=True))


def test_a_lane_of_a_billion_rows_costs_what_a_lane_of_few_does():
    lane = LaneOrder("big", np.full(100_000, 10_000_000), streams=16, seed=0, shuffle=True)
    segment = lane.segment(3, 1)
    piece = segment[len(segment) // 2]
    assert len(slice_rows(piece, 10_000_000, 10_000_000)) == 10_000_000
    assert abs(segment.nbytes - lane.nbytes / 16) <= 1
