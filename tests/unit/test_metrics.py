"""What a step's numbers become: TensorBoard's curves."""

from __future__ import annotations

import pytest

from ftlaunch.distributed.memory import memory_bytes
from ftlaunch.distributed.metrics import TensorBoard
from ftlaunch.distributed.world import World


def test_tensorboard_reads_every_value(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoard(str(tmp_path))
    for step in range(1, 25):
        writer.log(step, {"train/loss": 4.0 / step, "train/tokens": 1000.0 * step})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/tokens"]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 25))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([4.0 / s for s in range(1, 25)])


def test_resident_memory_is_that_of_now():
    before = memory_bytes(World())
    filled = bytearray(b"x" * 64 * 2**20)
    assert memory_bytes(World()) - before > len(filled) // 2
