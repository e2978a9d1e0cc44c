"""The table of strategies: `strategy.type` -> where the function is that lays a model out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ...recipes.schema import Recipe
from ..world import World
from .base import Engine

if TYPE_CHECKING:
    from ..model import BuiltModel

STRATEGIES = {
    "ddp": "fsdp:prepare",
    "fsdp": "fsdp:prepare",
    "deepspeed": "deepspeed:prepare",
}


def prepare(built: BuiltModel, recipe: Recipe, world: World) -> Engine:
    """The recipe's strategy, applied."""
    module, _, name = STRATEGIES[recipe.strategy.type].partition(":")
    engine: Engine = getattr(import_module(f".{module}", __package__), name)(built, recipe, world)
    return engine
