"""A world of one GPU, in the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training import QuietMonitor, Trained, read_run

from ftlaunch.distributed import entry
from ftlaunch.distributed.world import World
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

CUDA = World(device="cuda:0")


def train_on(world: World, recipe: dict[str, Any]) -> Trained:
    """Run a recipe as the only rank, or go on with its run; what it wrote down."""
    loaded = LoadedRecipe(Recipe.model_validate(recipe), "test.yaml", (), ())
    entry.run_rank(entry.Job(loaded, world, "env://", QuietMonitor(), ("test",)))
    return read_run(Path(recipe["checkpoint"]["path"]) / recipe["name"])
