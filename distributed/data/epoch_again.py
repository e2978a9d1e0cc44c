"""Going on with files that are no longer those of the run: the epoch that the run is in begins again on the new ones.

The order is a function of the list of blocks, so positions in the order of the old files say nothing about the new
ones. Per lane, every stream goes back to the beginning of the epoch that the slowest stream is in. Earlier epochs count
as done; rows that this epoch had served come once more, none is left out. Samples that waited for a place are let go:
they are rows of this epoch too, or the last few of the one before. Counters, and how often each lane has been drawn,
stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from .lane_plan import LanePlan
from .lanes import Position, bytes_of_epochs

States = Mapping[str, Mapping[str, Any]]
"""Stream's number -> its state, of all ranks."""


class EpochAgain(NamedTuple):
    """States of all streams on the new order, and the bytes of it that count as served. `epoch`: of the lane
    that the run is counted on, from 0."""

    states: dict[str, dict[str, Any]]
    served_bytes: int
    epoch: int


def begin_epoch_again(states: States, plans: Sequence[LanePlan]) -> EpochAgain:
    """`states`: taken on the old files; `plans`: the lanes of the new ones."""
    epochs = {plan.order.name: min(_epoch(state, plan.order.name) for state in states.values()) for plan in plans}
    counted = [plan for plan in plans if plan.counted]
    epoch = min(epochs[plan.order.name] for plan in counted)
    served = {
        number: sum(bytes_of_epochs(plan.order, int(number), Fraction(epochs[plan.order.name])) for plan in counted)
        for number in states
    }
    again = {
        number: {
            **state,
            "lanes": {name: list(Position(epoch=at, kept_epoch=at)) for name, at in epochs.items()},
            "buffer": [],
            "pending": None,
            "accepted_epoch": epoch,
            "served_bytes": served[number],
        }
        for number, state in states.items()
    }
    return EpochAgain(again, sum(served.values()), epoch)


def _epoch(state: Mapping[str, Any], lane: str) -> int:
    return Position(*state["lanes"][lane]).epoch
