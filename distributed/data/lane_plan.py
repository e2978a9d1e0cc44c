"""From a recipe's sources to lanes: which blocks are served as one sequence, how often, with which weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from ...recipes.schema import Data, EvalSplit, Train
from .held_out import held_out
from .index import Index
from .lanes import bytes_of_epochs
from .order import Int64s, LaneOrder, integer_weights

Keep = Callable[[Mapping[str, Any]], bool]

ALL_SOURCES = "*"
"""Name of the one lane of unweighted sources; no source can be called that."""


def epochs_of(train: Train) -> int | None:
    """Epochs that end the run; None: it ends by steps or tokens."""
    if train.num_epochs is None and train.max_steps is None and train.max_tokens is None:
        return 1
    return train.num_epochs


class LanePlan(NamedTuple):
    """A lane before any stream reads it. `counted`: the run's progress is counted on it."""

    order: LaneOrder
    block_ids: Int64s
    weight: int
    counted: bool
    max_epochs: Fraction | None


def total_bytes(plans: Sequence[LanePlan]) -> int:
    """Bytes that all streams serve of the counted lanes in the whole run; 0 when that has no end."""
    if any(plan.counted and plan.max_epochs is None for plan in plans):
        return 0
    return sum(
        bytes_of_epochs(plan.order, stream, plan.max_epochs)
        for plan in plans
        if plan.counted and plan.max_epochs is not None
        for stream in range(plan.order.streams)
    )


def by_source(data: Data) -> bool:
    """Whether every source has a lane of its own."""
    return any(source.weight is not None or source.num_epochs is not None for source in data.train)


def integer_weights_of(data: Data) -> tuple[int, ...]:
    """The sources' weights as exact integers; all 1 without weights."""
    return integer_weights([source.weight or 1.0 for source in data.train])


def order_key(data: Data, train: Train) -> str:
    """What a position in the data means depends on this, besides the data: another key, another order."""
    shuffled, lanes = "shuffled" if data.shuffle else "in order", "by source" if by_source(data) else "whole"
    return f"seed {train.seed}, {shuffled}, {lanes}"


def plan_lanes(index: Index, data: Data, train: Train, streams: int) -> list[LanePlan]:
    """The lanes of the training data: one of everything; or one per source, where there are weights, or passes of a
    source's own."""
    build = partial(LaneOrder, streams=streams, seed=train.seed, shuffle=data.shuffle)
    epochs = None if epochs_of(train) is None else Fraction(epochs_of(train) or 0)
    if not by_source(data):
        blocks = index.used_blocks
        return [LanePlan(build(ALL_SOURCES, index.order_bytes[blocks]), blocks, 1, True, epochs)]
    weighted = data.train[0].weight is not None
    weights = integer_weights_of(data)
    primary = next((number for number, source in enumerate(data.train) if source.primary), 0)
    plans = []
    for number, source in enumerate(data.train):
        blocks = index.used_blocks[index.block_source[index.used_blocks] == number]
        order = build(index.sources[number].name, index.order_bytes[blocks])
        counted = not weighted or number == primary
        ends = epochs if counted or not source.repeat else None
        passes = ends if source.num_epochs is None else Fraction(str(source.num_epochs))
        plans.append(LanePlan(order, blocks, weights[number], counted, passes))
    return plans


def keeper(data: Data) -> Keep:
    """Which rows are trained on: all, or those that are not held out."""
    if isinstance(data.eval, EvalSplit):
        fraction = data.eval.fraction
        return lambda row: not held_out(row, fraction)
    return lambda _: True
