"""What torchrun's variables say."""

from __future__ import annotations

import pytest

from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import UserError


def variables(rank: int, size: int, local_rank: int, local_size: int, node: int) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    return dict(zip(names, map(str, (rank, size, local_rank, local_size, node)), strict=True))


def test_a_rank_of_several_nodes():
    world = World.from_torchrun(variables(5, 8, 1, 4, 1), num_gpus=4)
    assert world == World(5, 8, 1, 4, node_rank=1, num_nodes=2, device="cuda:1")
    assert not world.is_main


def test_without_gpus_all_ranks_compute_on_the_cpu():
    assert {World.from_torchrun(variables(r, 4, r, 4, 0), num_gpus=0).device for r in range(4)} == {"cpu"}


def test_without_torchrun_it_is_alone():
    assert World.from_torchrun({}, num_gpus=8) == World(device="cuda:0")


@pytest.mark.parametrize("rank", range(4))
def test_more_ranks_than_gpus_are_refused_on_every_rank(rank):
    with pytest.raises(UserError, match=r"nproc-per-node 4: this node shows 2 GPUs.*Start 2 ranks"):
        World.from_torchrun(variables(rank, 4, rank, 4, 0), num_gpus=2)
