"""From a recipe's sources to lanes: which blocks are served as one sequence, how often, with which weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...recipes.schema import Data, EvalSplit, Train
from .held_out import held_out
from .index import Index
from .order import LaneOrder, integer_weights

Keep = Callable[[Mapping[str, Any]], bool]

ALL_SOURCES = "*"
"""Name of the one lane of unweighted sources; no source can be called that."""


def epochs_of(train: Train) -> int | None:
    """Epochs that end the run; None: it ends by steps or tokens."""
    if train.num_epochs is None and train.max_steps is None and train.max_tokens is None:
        return 1
    return train.num_epochs


class LanePlan(NamedTuple):
    """A lane before any stream reads it."""

    order: LaneOrder
    block_ids: np.ndarray[Any, np.dtype[np.int64]]
    weight: int
    primary: bool
    max_epochs: int | None


def plan_lanes(index: Index, data: Data, train: Train, streams: int) -> list[LanePlan]:
    """The lanes of the training data: one of everything without weights, else one per source."""
    build = partial(LaneOrder, streams=streams, seed=train.seed, shuffle=data.shuffle)
    epochs = epochs_of(train)
    if data.train[0].weight is None:
        blocks = index.used_blocks
        return [LanePlan(build(ALL_SOURCES, index.order_bytes[blocks]), blocks, 1, True, epochs)]
    weights = integer_weights([source.weight or 0.0 for source in data.train])
    primary = next((number for number, source in enumerate(data.train) if source.primary), 0)
    plans = []
    for number, source in enumerate(data.train):
        blocks = index.used_blocks[index.block_source[index.used_blocks] == number]
        order = build(index.sources[number].name, index.order_bytes[blocks])
        ends = number == primary or not source.repeat
        plans.append(LanePlan(order, blocks, weights[number], number == primary, epochs if ends else None))
    return plans


def keeper(data: Data) -> Keep:
    """Which rows are trained on: all, or those that are not held out."""
    if isinstance(data.eval, EvalSplit):
        fraction = data.eval.fraction
        return lambda row: not held_out(row, fraction)
    return lambda _: True
