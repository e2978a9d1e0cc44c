"""What of a model one rank keeps under each strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..recipes.schema import Recipe
from ..recipes.schema_strategy import Deepspeed, Fsdp

MASTER = GRADIENT = 4
"""fp32."""


@dataclass(frozen=True)
class Kept:
    """Bytes per parameter on one rank's device; of the optimizer's state, the share. `gathers`: whether the block at
    work is fetched from all ranks."""

    trained: float
    frozen: float
    gradients: float
    optimizer: float
    gathers: bool = True


def kept(recipe: Recipe, ranks: int, nodes: int, width: int) -> Kept:
    """What the recipe's strategy keeps; `width`: bytes of a published value."""
    return KEPT[recipe.strategy.type](recipe, ranks, nodes, width)


def _ddp(recipe: Recipe, ranks: int, nodes: int, width: int) -> Kept:
    return Kept(MASTER, width, GRADIENT, 1.0)


def _fsdp(recipe: Recipe, ranks: int, nodes: int, width: int) -> Kept:
    strategy = recipe.strategy
    assert isinstance(strategy, Fsdp)
    share = 0.0 if strategy.offload == "cpu" else (nodes if strategy.shard == "node" else 1) / ranks
    return Kept(MASTER * share, width * share, GRADIENT * share, share)


def _deepspeed(recipe: Recipe, ranks: int, nodes: int, width: int) -> Kept:
    """DeepSpeed computes with a copy of the weights beside the fp32 ones, in float32 too."""
    strategy = recipe.strategy
    assert isinstance(strategy, Deepspeed)
    on_device = strategy.offload_optimizer == "none"
    weights = {"none": width / (ranks if strategy.stage == 3 else 1), "cpu": 0.0}[strategy.offload_param]
    return Kept(
        trained=weights + on_device * MASTER / ranks,
        frozen=weights,
        gradients=GRADIENT / (ranks if strategy.stage > 1 else 1) if on_device else 0.0,
        optimizer=on_device / ranks,
        gathers=strategy.stage == 3,
    )


KEPT: dict[str, Callable[[Recipe, int, int, int], Kept]] = {"ddp": _ddp, "fsdp": _fsdp, "deepspeed": _deepspeed}
