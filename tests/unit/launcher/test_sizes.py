"""With how many nodes a run goes on."""

from __future__ import annotations

import pytest

from ftlaunch.cluster.base import Demand
from ftlaunch.launcher.sizes import choose_nodes, micro_batches
from ftlaunch.recipes.schema import Recipe


def recipe(batch: int, micro: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"path": "m"},
            "data": {"train": [{"path": "d.jsonl", "format": "text"}], "sequence_length": 8},
            "train": {"max_steps": 1, "global_batch_size": batch, "micro_batch_size": micro},
        }
    )


def demand(least: int | None, most: int, per_node: int = 1) -> Demand:
    return Demand(most, most * per_node, uses_gpus=False, cpus_per_rank=1, least_nodes=least)


@pytest.mark.parametrize(
    ("available", "least", "most", "per_node", "batch", "micro", "chosen"),
    [
        (3, None, 3, 1, 6, 1, 3),
        (2, None, 3, 1, 6, 1, None),  # not elastic
        (9, None, 3, 1, 6, 1, 3),
        (3, 1, 4, 1, 4, 1, 2),  # 3 ranks need 2 micro-batches each, as 2 do
        (4, 1, 4, 1, 4, 1, 4),
        (1, 1, 4, 1, 4, 1, 1),
        (0, 1, 4, 1, 4, 1, None),
        (7, 6, 8, 8, 128, 1, 6),  # 43 to 63 ranks: 3 each
        (8, 6, 8, 8, 128, 1, 8),  # 64: 2 each
        (5, 6, 8, 8, 128, 1, None),
        (8, 1, 8, 1, 2, 1, 2),  # the others would have nothing
    ],
)
def test_sizes(available, least, most, per_node, batch, micro, chosen):
    made = recipe(batch, micro)
    assert choose_nodes(available, demand(least, most, per_node), made, streams=min(batch, 64)) == chosen


def test_fewer_nodes_never_have_less_to_do():
    made, wanted = recipe(12, 2), demand(1, 12)
    work = [micro_batches(nodes, wanted, made, streams=12) for nodes in range(1, 13)]
    assert work == sorted(work, reverse=True)
    assert work[0] == 6
