"""With how many of the nodes that are there a run goes on. Pure."""

from __future__ import annotations

from ..cluster.base import Demand
from ..distributed.data.share import share_of
from ..recipes.schema import Recipe


def choose_nodes(available: int, demand: Demand, recipe: Recipe, streams: int) -> int | None:
    """Nodes to use of those that are there; None: too few.

    A step's global batch is the same at every size, so what counts is how many micro-batches the busiest rank has of
    it. Of the sizes with the fewest the smallest: a node that makes no step shorter would only compute padding."""
    sizes = range(demand.needed_nodes, min(available, demand.nodes) + 1)
    return min(sizes, key=lambda nodes: (micro_batches(nodes, demand, recipe, streams), nodes), default=None)


def micro_batches(nodes: int, demand: Demand, recipe: Recipe, streams: int) -> int:
    """Of the busiest rank in every step."""
    train = recipe.train
    ranks = nodes * demand.ranks_per_node
    return share_of(0, ranks, streams, train.global_batch_size, train.micro_batch_size).micro_batches
