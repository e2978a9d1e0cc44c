"""What a run that goes on reads before its first step: all of it at once."""

from __future__ import annotations

import threading

import pyarrow as pa
import pyarrow.parquet as pq
from streams import bins_of, collate, encode

from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.index import Index
from ftlaunch.distributed.data.node_cache import BlockReader
from ftlaunch.distributed.data.read_limit import MAX_READS, ReadLimit
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.recipes.schema import Recipe

STREAMS = 4
LIMIT_S = 20
"""Until a test that hangs is given up."""


class Gate:
    """Blocks are handed out only once `many` of them are being read."""

    def __init__(self, many: int) -> None:
        self._many = many
        self._asked: set[int] = set()
        self._changed = threading.Condition()

    def pass_through(self, block: int) -> None:
        with self._changed:
            self._asked.add(block)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: len(self._asked) >= self._many, LIMIT_S), (
                f"{len(self._asked)} blocks were asked for before the first came, of {self._many}"
            )


def open_in(folder):
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "model": {"path": "none"},
            "data": {
                "sequence_length": 64,
                "pack_buffer": 24,
                "train": [{"path": str(folder), "format": "text"}],
            },
            "train": {"global_batch_size": STREAMS},
        }
    )
    return open_stream(
        index=build_index(recipe.data.train, ["s"]), recipe=recipe, world_rank=0, world_size=1, streams=STREAMS,
        encode=encode, collate=collate,
    )  # fmt: skip


def stopped_in_the_middle(folder):
    """States of the streams, and the bins of the next steps."""
    rows = [f"{number} {1 + number * 7 % 30}" for number in range(1600)]
    pq.write_table(pa.table({"text": rows}), folder / "a.parquet", row_group_size=20)
    stream = open_in(folder)
    for _ in range(40):
        stream.next_step()
    states = stream.state()
    rest = [bins_of(stream.next_step()) for _ in range(3)]
    stream.close()
    return states, rest


def test_what_all_streams_need_is_asked_for_before_any_of_it_comes(tmp_path, monkeypatch):
    states, rest = stopped_in_the_middle(tmp_path)
    held = {address[0] for state in states.values() for address in state["buffer"]}
    assert len(held) >= 8, "otherwise the test shows nothing"

    monkeypatch.setattr(BlockReader, "joins", lambda *_: False)  # every block by a read of its own
    gate, read = Gate(min(MAX_READS, len(held))), Index.read_whole

    def gated(index, block):
        gate.pass_through(block)
        return read(index, block)

    monkeypatch.setattr(Index, "read_whole", gated)
    again = open_in(tmp_path)
    again.restore(states)
    assert [bins_of(again.next_step()) for _ in range(3)] == rest
    again.close()


def test_blocks_that_lie_beside_each_other_come_by_one_read(tmp_path, monkeypatch):
    states, rest = stopped_in_the_middle(tmp_path)

    runs, read = [], Index.read_run

    def noted(index, blocks):
        runs.append(list(blocks))
        return read(index, blocks)

    monkeypatch.setattr(Index, "read_run", noted)
    again = open_in(tmp_path)
    again.restore(states)
    held = {address[0] for state in states.values() for address in state["buffer"]}
    begun = {block for run in runs for block in run}
    assert len(begun & held) > len(held) / 2, (runs, held)
    assert all(run == list(range(run[0], run[0] + len(run))) for run in runs)
    assert [bins_of(again.next_step()) for _ in range(3)] == rest
    again.close()


def test_a_lifted_limit_is_what_it_was_afterwards():
    limit = ReadLimit(first=4, most=16)
    with limit.lifted():
        assert limit.value == 16
        for read in range(64):
            limit.done(1, float(read), waiting=True)
        assert limit.value == 16
    assert limit.value == 4
