"""The harness itself: values come back by rank, and what goes wrong on a rank is seen."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch
import torch.distributed as dist
from harness import RanksFailed, run_distributed, start_distributed


def add_up(rank, size, factor):
    value = torch.tensor([float(rank * factor)])
    dist.all_reduce(value)
    return rank, size, value.item()


def fail_on_one(rank, size):
    if rank == 1:
        raise ValueError("what went wrong")
    return rank


def die_on_one(rank, size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_values_come_back_by_rank():
    assert run_distributed(add_up, 3, 10) == [(0, 3, 30.0), (1, 3, 30.0), (2, 3, 30.0)]


def test_the_traceback_of_a_rank_is_shown():
    with pytest.raises(RanksFailed, match=r"rank 1: Traceback[\s\S]*what went wrong"):
        run_distributed(fail_on_one, 2)


def test_a_rank_that_dies_is_named():
    outcomes = start_distributed(die_on_one, 2).join()
    assert outcomes[1].exit_code == -signal.SIGKILL
    assert outcomes[0].error is not None


class Hangs:
    """Ends any process but the one it was made in, as soon as it is collected there."""

    def __init__(self) -> None:
        self.made_in = os.getpid()
        self.itself = self  # only the collector finds it

    def __del__(self) -> None:
        if os.getpid() != self.made_in:
            os._exit(3)


def collect(rank, size):
    gc.collect()
    return rank


def test_a_rank_does_not_collect_what_it_has_inherited():
    kept = Hangs()
    gc.disable()
    try:
        Hangs()
        assert run_distributed(collect, 2) == [0, 1]
    finally:
        gc.enable()
    assert kept.itself is kept
