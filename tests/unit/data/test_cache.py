"""What is read when: asked-for blocks first, reading ahead within its bytes, and as many reads at once as help."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from ftlaunch.distributed.data.cache import JOINED_BYTES, BlockCache
from ftlaunch.distributed.data.feed import Room
from ftlaunch.distributed.data.read_limit import FEWEST_READS, FIRST_READS, REST_ROUNDS, ReadLimit

MIB = 2**20


@dataclass(eq=False)
class Fake:
    """A block of so many bytes."""

    number: int
    memory_bytes: int
    num_rows: int = 1

    def row(self, _number: int) -> dict[str, Any]:
        return {}

    def line(self, _number: int) -> None:
        return None


class Store:
    """Reads that wait until they are allowed to end; `begun` says in which order they began."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes
        self.begun: queue.Queue[int] = queue.Queue()
        self.gates = {block: threading.Event() for block in sizes}

    def read(self, block: int) -> Fake:
        self.begun.put(block)
        assert self.gates[block].wait(60)
        return Fake(block, 4 * self.sizes[block])

    def open(self, block: int) -> None:
        self.gates[block].set()

    def begins(self, count: int) -> list[int]:
        return sorted(self.begun.get(timeout=60) for _ in range(count))

    def cache(self, **options: Any) -> BlockCache:
        return BlockCache(self.read, stored_bytes=self.sizes.__getitem__, **options)


def test_reading_ahead_keeps_to_its_bytes_and_goes_on_when_blocks_are_asked_for():
    store = Store(dict.fromkeys(range(6), MIB))
    cache = store.cache(max_bytes=8 * MIB)  # two blocks of four decoded MiB
    ahead = cache.prefetch(range(6))
    assert store.begins(2) == [0, 1]
    for block in range(6):
        store.open(block)
    assert ahead[1].result(60).number == 1
    assert store.begun.empty(), "both are still unasked"
    assert cache.get(0).number == 0
    assert store.begins(1) == [2]
    assert [block.number for block in cache.get_all(range(6))] == [0, 1, 2, 3, 4, 5]
    assert store.begins(3) == [3, 4, 5]
    cache.close()


def test_what_is_due_first_is_read_first_whoever_asked_earlier():
    store = Store(dict.fromkeys(range(7), MIB))
    cache = store.cache(readers=1)
    held = [cache.prefetch([0], due=[0.0])]
    assert store.begins(1) == [0]
    held.append(cache.prefetch([1, 2, 3, 4], due=[0.1, 0.3, 0.5, 0.7]))  # a stream, far ahead
    held.append(cache.prefetch([5, 6, 4], due=[0.2, 0.4, 0.6]))  # another, which wants one of the same blocks sooner
    for block in store.sizes:
        store.open(block)
    assert [store.begun.get(timeout=60) for _ in range(6)] == [1, 5, 2, 6, 3, 4]
    cache.close()


def test_what_is_asked_for_is_read_before_what_is_ahead():
    store = Store(dict.fromkeys(range(9), MIB))
    cache = store.cache(readers=1)
    ahead = cache.prefetch(range(8))
    assert store.begins(1) == [0]
    asking = threading.Thread(target=cache.get_all, args=([8, 7],))
    asking.start()
    while 8 not in cache._pending:
        pass
    for block in range(9):
        store.open(block)
    asking.join(60)
    assert [store.begun.get(timeout=60) for _ in range(3)] == [8, 7, 1]
    assert {one.result(60).number for one in ahead} == set(range(8))
    cache.close()


def test_a_block_too_large_to_be_read_ahead_waits_until_it_is_asked_for():
    store = Store({0: 100 * MIB, 1: MIB})
    for block in (0, 1):
        store.open(block)
    cache = store.cache(max_bytes=8 * MIB)
    ahead = cache.prefetch([0, 1])
    assert ahead[1].result(60).number == 1
    assert not ahead[0].done()
    assert cache.get(0).number == 0
    assert ahead[0].result(60).number == 0
    cache.close()


def test_room_is_made_by_who_lets_go_without_asking():
    store = Store(dict.fromkeys(range(4), MIB))
    for block in range(4):
        store.open(block)
    cache = store.cache(max_bytes=4 * MIB)
    for block in (0, 1, 2):
        [ahead] = cache.prefetch([block])
        assert ahead.result(60).number == block
        del ahead
    cache.close()


def test_of_a_part_it_is_said_so():
    said = []

    def note(block: int) -> Fake:
        said.append(block)
        return Fake(block, 1)

    cache = BlockCache(lambda block: Fake(block, 1), read_part=note)
    cache.get_all([0, 1, 2], parts={1})
    assert said == [1]
    cache.close()


class Shelf:
    """Neighbours that are read together, but not across a multiple of ten; `broken` ones cannot be read."""

    def __init__(self, broken: set[int] = frozenset()) -> None:
        self.broken = broken
        self.runs: list[list[int]] = []

    def joins(self, block: int) -> bool:
        return (block + 1) % 10 != 0

    def read_run(self, blocks: Sequence[int]) -> list[Fake]:
        self.runs.append(list(blocks))
        return [self.read(block) for block in blocks]

    def read(self, block: int) -> Fake:
        if block in self.broken:
            raise ValueError(f"block {block} is broken")
        return Fake(block, 1)


def shelf_cache(shelf: Shelf, nbytes: int) -> BlockCache:
    return BlockCache(shelf.read, stored_bytes=lambda _: nbytes, neighbours=shelf)


def test_neighbours_that_are_wanted_together_are_one_read():
    shelf = Shelf()
    cache = shelf_cache(shelf, JOINED_BYTES // 4)
    with cache.all_at_once():
        ahead = [*cache.prefetch([7, 12, 2]), *cache.prefetch([8, 10, 9, 11, 3, 14])]
        assert not shelf.runs, "somebody might ask for more"
        assert cache.get(3).number == 3
    assert [one.result(60).number for one in ahead] == [7, 12, 2, 8, 10, 9, 11, 3, 14]
    assert sorted(shelf.runs) == [[2, 3], [7, 8, 9], [10, 11, 12]]
    cache.close()


def test_a_read_of_neighbours_stays_small():
    shelf = Shelf()
    cache = shelf_cache(shelf, JOINED_BYTES // 4)
    assert [block.number for block in cache.get_all(range(10))] == list(range(10))
    assert sorted(shelf.runs) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    cache.close()
    alone = Shelf()
    cache = shelf_cache(alone, JOINED_BYTES)
    assert [block.number for block in cache.get_all(range(10))] == list(range(10))
    assert not alone.runs
    cache.close()


def test_a_broken_block_breaks_none_of_its_neighbours():
    shelf = Shelf(broken={4})
    cache = shelf_cache(shelf, 1)
    ahead = cache.prefetch(range(3, 6))
    assert [ahead[0].result(60).number, ahead[2].result(60).number] == [3, 5]
    with pytest.raises(ValueError, match="block 4"):
        cache.get(4)
    cache.close()


def run_link(limit: ReadLimit, rate_at: Any, rounds: int, *, waiting: bool = True) -> list[int]:
    """The limit after each round on a link that gives `rate_at(reads in flight)` blocks a second."""
    now, values = 0.0, []
    for _ in range(rounds):
        value = limit.value
        for _ in range(value + 1):
            now += 1 / rate_at(value)
            limit.done(1, now, waiting=waiting)
        values.append(limit.value)
    return values


def test_more_reads_as_long_as_they_bring_throughput():
    assert run_link(ReadLimit(), lambda reads: reads, 8)[-1] == 32


@pytest.mark.parametrize("best", [4, 8, 16])
def test_no_more_than_twice_what_fills_the_link(best):
    assert max(run_link(ReadLimit(), lambda reads: min(reads, best), REST_ROUNDS)) == 2 * best


def test_a_doubling_that_harms_is_taken_back():
    values = run_link(ReadLimit(), lambda reads: reads if reads <= FEWEST_READS else 5, REST_ROUNDS // 2)
    assert max(values) == 2 * FEWEST_READS
    assert set(values[3:]) == {FEWEST_READS}


def test_a_few_reads_share_the_link_however_little_more_of_them_seem_to_bring():
    values = run_link(ReadLimit(), lambda reads: 10 if reads <= FIRST_READS else 5, REST_ROUNDS // 2)
    assert set(values[1:]) == {FEWEST_READS}


def test_while_nobody_waits_nothing_changes():
    assert set(run_link(ReadLimit(), lambda reads: reads, 20, waiting=False)) == {FIRST_READS}


def test_room_is_counted_in_bytes_and_in_steps_and_one_step_always_fits():
    room = Room(max_bytes=100, max_steps=3)
    assert room.take(1000)  # larger than everything, and nothing waits
    taken = threading.Event()
    thread = threading.Thread(target=lambda: (room.take(60), taken.set()))
    thread.start()
    assert not taken.wait(0.05)
    room.give_back(1000)
    assert taken.wait(60)
    thread.join()
    assert room.take(20)
    assert room.take(20)
    room.close()
    assert not room.take(0), "three steps wait, whatever their size; closing wakes who waits"


def test_room_says_how_long_a_reader_stood_still():
    now, stands_still = [0.0], threading.Event()

    def clock():
        began = now[0]
        stands_still.set()
        return began

    room = Room(10, 1, clock)
    assert room.take(1)
    assert room.waited_s == 0.0
    thread = threading.Thread(target=room.take, args=(1,))
    thread.start()
    assert stands_still.wait(60)
    now[0] = 5.0
    room.give_back(1)
    thread.join()
    assert room.waited_s == 5.0
