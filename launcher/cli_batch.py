"""`ftlaunch batch` on the command line. Registered by `cli.py`; parsing only, as there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..recipes.errors import UserError
from .arguments import RECIPE_SUFFIXES
from .cli_recipe import AS_WRITTEN, Place, environment, load

if TYPE_CHECKING:
    from ..recipes.load import LoadedRecipe

Words = Annotated[str, Parameter(help="Recipes, and values to change in all of them: key.sub=value.")]


def batch(
    *words: Words,
    place: Place = AS_WRITTEN,
    sweep: Annotated[list[str] | None, Parameter(negative=())] = None,
    at_once: int = 1,
    name: str | None = None,
    accept_changes: bool = False,
    accept_changed_data: bool = False,
    dry_run: bool = False,
) -> int:
    """Train several recipes, or one with every combination of some values, and compare the results.

    Parameters
    ----------
    sweep
        key.sub=value,value,…: one run for each value. Given several times, one run for each combination.
    at_once
        Runs at the same time. On this machine's GPUs each then needs --gpus-per-node.
    name
        Of the batch: its logs and its comparison go to batches/NAME.
    accept_changes
        Continue runs although numbers that shape the training were changed.
    accept_changed_data
        Continue runs with data files as they are now.
    dry_run
        Check everything and list the runs; start nothing.
    """
    from ..distributed.again import Flags
    from .batch.command import Options, run_batch

    if at_once < 1:
        raise UserError(f"--at-once {at_once}: at least 1")
    recipes, overrides = _split(words)
    flags = Flags(False, accept_changes, accept_changed_data)
    options = Options(sweep or [], at_once, name, flags, _options(place), dry_run)

    def load_one(recipe: Path, changes: Sequence[str]) -> LoadedRecipe:
        return load(recipe, changes, place)

    return run_batch(recipes, overrides, options, load_one, environment())


def _split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Recipes, and overrides. Raises UserError where there is no recipe."""
    recipes = [Path(word) for word in words if word.endswith(RECIPE_SUFFIXES) and "=" not in word]
    overrides = [word for word in words if Path(word) not in recipes]
    if not recipes:
        raise UserError("batch: name at least one recipe (a .yaml file)")
    return recipes, overrides


def _options(place: Place) -> list[str]:
    """The words that say it again."""
    given = (("--nodes", place.nodes), ("--gpus-per-node", place.gpus_per_node), ("--cluster", place.cluster))
    return [word for option, value in given if value is not None for word in (option, str(value))]
