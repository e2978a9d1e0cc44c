"""What a lane has read before it is needed: the first window alone, then more the further it is."""

from __future__ import annotations

from concurrent.futures import Future
from fractions import Fraction
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

from ftlaunch.distributed.data import lanes, order
from ftlaunch.distributed.data.lanes import LaneReader
from ftlaunch.distributed.data.order import LaneOrder

WINDOW, BLOCKS, BLOCK_BYTES = 80, 40, 10


class Cache:
    """Blocks of two rows, there at once; `asked` ahead in the last call, `read` by those who waited."""

    def __init__(self):
        self.asked, self.read = None, []

    def prefetch(self, blocks, parts=(), due=None):
        self.asked = list(blocks)
        return [Future() for _ in self.asked]

    def get_all(self, blocks, parts=(), needed_bytes=0):
        self.read.append(list(blocks))
        return [SimpleNamespace(num_rows=2) for _ in blocks]


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(order, "WINDOW_BYTES", WINDOW)
    monkeypatch.setattr(lanes, "WINDOW_BYTES", WINDOW)
    lane = LaneOrder("x", np.full(BLOCKS, BLOCK_BYTES), streams=1, seed=0, shuffle=True)
    rows = SimpleNamespace(cache=Cache(), values=lambda decoded, block, row: {"row": (block, row)})

    def make(epochs):
        reader = LaneReader(
            lane, np.arange(BLOCKS), stream=0, rows=rows, keep=lambda row: True, max_epochs=epochs and Fraction(epochs)
        )
        return reader, rows.cache

    return lane, make


def blocks_of(segment, windows):
    return [piece.block for window in list(segment.windows(0))[windows] for piece in window]


def test_the_first_window_comes_alone(opened):
    lane, make = opened
    reader, cache = make(1)
    segment = lane.segment(0, 0)
    reader.ask_first()
    assert cache.asked == blocks_of(segment, slice(1))
    cache.asked = None
    reader.draw()
    assert cache.read == [blocks_of(segment, slice(1))]
    assert cache.asked is None, "the first rows of all streams are read before anything else"
    reader.ask_ahead()
    assert cache.asked == blocks_of(segment, slice(1, 3)), "twice as much as was opened"
    for _ in range(2):
        reader.draw()
    assert cache.asked == blocks_of(segment, slice(2, 4)), "and so on, after each window that is opened"


@pytest.mark.parametrize("epochs", [1, 2, None])
def test_reading_ahead_goes_on_into_the_next_epoch(opened, epochs):
    lane, make = opened
    reader, cache = make(epochs)
    asked_ahead = []
    while reader.position.epoch == 0 and (drawn := reader.draw()) is not None:
        assert drawn.values == {"row": (drawn.block, drawn.row)}
        asked_ahead.append(cache.asked)
    whole = list(chain(*cache.read))
    first = lane.segment(0, 0)
    assert whole[: len(first)] == [first[number].block for number in range(len(first))]
    last_windows = [ahead for ahead in asked_ahead if ahead is not None][-8:]
    coming = blocks_of(lane.segment(0, 1), slice(1))
    if epochs == 1:
        assert last_windows[-1] == []
    else:
        assert last_windows[0][-len(coming) :] == coming, "a full window is under way while small ones end the epoch"


def test_nothing_is_asked_for_behind_the_end(opened):
    _, make = opened
    reader, cache = make(1)
    while reader.draw() is not None:
        pass
    cache.asked = None
    reader.ask_first()
    assert cache.asked is None
