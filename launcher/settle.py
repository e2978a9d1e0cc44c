"""What starting a recipe comes to, read from its run directory by whoever sees that: the driver, and a machine that
submits."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from ..distributed import storage
from ..distributed.again import Decision, Flags, decide, gather
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import UserError
from ..recipes.load import LoadedRecipe, as_stored
from .runs import fresh_name
from .say import say


def run_of(loaded: LoadedRecipe) -> RunDirectory:
    """The directory of a recipe's run."""
    return RunDirectory(storage.join(loaded.recipe.checkpoint.path, loaded.recipe.name))


def settle(
    run: RunDirectory, loaded: LoadedRecipe, flags: Flags, console: Console, *, takes_over: bool = False
) -> Decision:
    """What is to be done. `takes_over`: from a driver that has died, whose ranks have ended or are about to. Raises
    UserError for a refusal."""
    facts = gather(run, lambda line: say(console, line, "yellow"))
    decision = decide(replace(facts, alive=None) if takes_over else facts, as_stored(loaded), flags)
    if decision.action in ("stop", "alive"):
        raise UserError(decision.message)
    return decision


def announce(console: Console, decision: Decision) -> None:
    """Say what is done."""
    say(console, decision.message, "bold")
    for change in decision.changes:
        say(console, f"  changed: {change}")


def renamed(loaded: LoadedRecipe) -> LoadedRecipe:
    """Under the first name that is free."""
    taken = set(storage.list_names(loaded.recipe.checkpoint.path))
    name = fresh_name(loaded.recipe.name, taken)
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"name": name}))
