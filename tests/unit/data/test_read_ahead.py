"""Batches made in a thread while earlier ones are used."""

from __future__ import annotations

import threading
from collections.abc import Generator

import numpy as np
import pytest

from ftlaunch.distributed.data.feed import AHEAD_STEPS, read_ahead
from ftlaunch.distributed.data.parts import MicroBatch
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.base import Batch


def micro(number: int) -> MicroBatch:
    array = np.full((1, 2), number)
    return MicroBatch(Batch(array, array, array, ((),), 2), number)


class Source:
    """Batches without end, or up to a mistake; `made` counts them, `closed` tells that they are given up."""

    def __init__(self, mistake_at: int | None = None) -> None:
        self.made = 0
        self.closed = threading.Event()
        self._mistake_at = mistake_at

    def batches(self) -> Generator[MicroBatch, None, None]:
        try:
            while True:
                if self.made == self._mistake_at:
                    raise UserError("a broken row")
                self.made += 1
                yield micro(self.made)
        finally:
            self.closed.set()


def test_all_come_in_order_and_the_source_is_closed():
    closed = threading.Event()

    def five() -> Generator[MicroBatch, None, None]:
        yield from map(micro, range(5))
        closed.set()

    assert [one.first_bin for one in read_ahead(five())] == [0, 1, 2, 3, 4]
    assert closed.is_set()


def test_a_mistake_comes_after_what_was_made_before_it():
    seen = []
    with pytest.raises(UserError, match="a broken row"):
        for one in read_ahead(Source(mistake_at=3).batches()):
            seen.append(one.first_bin)
    assert seen == [1, 2, 3]


def test_who_stops_early_ends_the_thread():
    source = Source()
    batches = read_ahead(source.batches())
    assert next(batches).first_bin == 1
    batches.close()
    assert source.closed.is_set()
    assert source.made <= AHEAD_STEPS + 2, "one taken, one in hand, the others waiting"
