"""What commands that take a recipe have in common on the command line; parsing only, as in `cli.py`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..recipes.problems import Origin

if TYPE_CHECKING:
    from ..distributed.run_directory import RunDirectory
    from ..recipes.checks import Rule
    from ..recipes.load import LoadedRecipe


@Parameter(name="*")
@dataclass(frozen=True)
class Place:
    """Where it runs: overrides of the recipe's `cluster` section."""

    nodes: Annotated[int | None, Parameter(help="Number of nodes.")] = None
    gpus_per_node: Annotated[int | None, Parameter(help="GPUs on each node, one rank each.")] = None
    cluster: Annotated[str | None, Parameter(help="Profile: clusters/NAME.yaml beside the recipe.")] = None


AS_WRITTEN = Place()
"""As the recipe says."""

RecipePath = Annotated[Path, Parameter(help="The recipe, a YAML file.")]
Overrides = Annotated[str, Parameter(help="Values of the recipe to change: key.sub=value.")]


secrets: list[str] = []
"""Values that must not appear in an error; known once a recipe is loaded. One process runs one command."""


origins: dict[str, Origin] = {}
"""Where the recipe's keys were written, for errors about their values."""


may_fork: ContextVar[bool] = ContextVar("may_fork", default=False)
"""Whether this process is the command; not a test or a library that calls `main`."""


def environment() -> Mapping[str, str]:
    """This process's variables, for what is told of them."""
    return os.environ


def load(recipe: Path, overrides: Sequence[str], place: Place, without: Collection[Rule] = ()) -> LoadedRecipe:
    """The recipe of a command line, checked `without` some rules. Raises UserError with every mistake."""
    from ..recipes.load import load_recipe

    loaded = load_recipe(recipe, overrides, without=without, **_given(place))
    remember(loaded)
    return loaded


def load_stored(run: RunDirectory, overrides: Sequence[str], place: Place) -> LoadedRecipe:
    """The recipe that a run keeps, with changes. Raises UserError."""
    from ..recipes.load import load_stored_recipe
    from .retry import stored_text

    loaded = load_stored_recipe(
        stored_text(run),
        run.path("recipe.yaml"),
        overrides,
        **_given(place),
    )
    remember(loaded)
    return loaded


def _given(place: Place) -> dict[str, Any]:
    """What a recipe is told by the command line and its surroundings."""
    return {
        "environ": os.environ,
        "nodes": place.nodes,
        "gpus_per_node": place.gpus_per_node,
        "cluster": place.cluster,
    }


def remember(loaded: LoadedRecipe) -> None:
    """For errors: what must not be in them, and where keys were written."""
    secrets.extend(loaded.secrets)
    origins.update(loaded.origins)
