"""The table of optimizers: `train.optimizer` -> where its class is, and what a run is told about it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from ...recipes.schema import Train
from .base import Shard, ShardGroup, ShardOptimizer


class Entry(NamedTuple):
    """`place` is MODULE:CLASS. `layout_bound`: why losses depend on the layout beyond rounding; None: they do not."""

    place: str
    layout_bound: str | None = None


OPTIMIZERS = {
    "adamw": Entry("adamw:AdamW"),
    "adamw_8bit": Entry(
        "adamw_8bit:AdamW8bit", "its moments are rounded to 8 bits in blocks, which lie otherwise at another world size"
    ),
    "adafactor": Entry("adafactor:Adafactor"),
    "muon": Entry(
        "muon:Muon", "its iterations compute in bfloat16, which turns other orders of sums into differences of 1e-3"
    ),
}


def build_optimizer(shards: Sequence[Shard], train: Train, group: ShardGroup) -> ShardOptimizer:
    """The recipe's optimizer over this rank's shards. Raises UserError where a library is missing."""
    module, _, name = OPTIMIZERS[train.optimizer].place.partition(":")
    optimizer: ShardOptimizer = getattr(import_module(f".{module}", __package__), name)(shards, train, group)
    return optimizer


def layout_note(train: Train) -> str | None:
    """What to tell the user at the start."""
    reason = OPTIMIZERS[train.optimizer].layout_bound
    if reason is None:
        return None
    return (
        f"train.optimizer {train.optimizer} is bound to the layout: {reason}. Losses of another number of ranks agree "
        "only roughly, and a resumed run goes on exactly at the same number only."
    )
