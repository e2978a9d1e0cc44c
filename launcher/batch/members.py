"""The runs of a batch, all looked at before the first one starts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...distributed import storage
from ...distributed.again import Flags, decide, gather
from ...distributed.run_directory import RunDirectory
from ...recipes.errors import FtlaunchError, UserError
from ...recipes.load import LoadedRecipe, as_stored
from ...recipes.problems import located
from ..hardware import Machine
from ..plan import make_plan
from ..plan_world import plan_batch, plan_world
from ..unknown import Unknown
from .sweep import Settings, combinations, member_name, parse_sweeps

Load = Callable[[Path, Sequence[str]], LoadedRecipe]
"""Loads a recipe file with overrides, as the command line has it."""

PLANNED = ("model", "adapter", "method", "data", "strategy", "cluster")
"""Sections of which all of a plan's mistakes depend; recipes that agree in them are planned once."""


@dataclass(frozen=True)
class Member:
    """One run of a batch. `overrides` are all that the command line lays over the recipe's file, its name too."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    settings: Settings
    loaded: LoadedRecipe

    @property
    def run(self) -> RunDirectory:
        """Where it is kept."""
        return RunDirectory(storage.join(self.loaded.recipe.checkpoint.path, self.name))


def make_members(recipes: Sequence[Path], overrides: Sequence[str], sweeps: Sequence[str], load: Load) -> list[Member]:
    """Every recipe with every combination of the sweeps. Raises UserError with the mistakes of all of them."""
    problems: list[str] = []
    chosen = combinations(parse_sweeps(sweeps, problems))
    members: list[Member] = []
    for recipe in recipes:
        made = [_member(recipe, overrides, settings, load, problems) for settings in chosen]
        members += [member for member in made if member]
    if not problems:
        problems += _same_place(members)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return members


def _member(
    recipe: Path, overrides: Sequence[str], settings: Settings, load: Load, problems: list[str]
) -> Member | None:
    try:
        loaded = load(recipe, [*overrides, *(f"{key}={value}" for key, value in settings)])
    except UserError as error:
        problems.append(f"{error} ({_said(settings)})" if settings else str(error))
        return None
    name = member_name(loaded.recipe.name, settings)
    every = (*overrides, *(f"{key}={value}" for key, value in settings), f"name={name}")
    named = replace(loaded, recipe=loaded.recipe.model_copy(update={"name": name}))
    return Member(name, recipe, every, settings, named)


def _said(settings: Settings) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings)


def _same_place(members: Sequence[Member]) -> Iterator[str]:
    """Runs of one name in one place would be one run."""
    for url, number in Counter(member.run.url for member in members).items():
        if number > 1:
            files = ", ".join(str(member.recipe) for member in members if member.run.url == url)
            yield f"{number} runs of the batch would be {url} ({files}); give the recipes names of their own (name: …)"


def check_members(members: Sequence[Member], machine: Machine, flags: Flags) -> list[str]:
    """What is wrong with runs that load: with their model and data, as far as they can be seen from here, with the
    world they ask for, and with what is there already under their names."""
    planned: dict[str, list[str]] = {}
    found: list[str] = []
    for member in members:
        key = _planned_key(member)
        if key not in planned:
            planned[key] = _problems_of(member, machine)
            found += planned[key]
        found += _deals(member, machine) if not planned[key] else []
        found += _stands(member, flags)
    return list(dict.fromkeys(found))


def _planned_key(member: Member) -> str:
    dumped = member.loaded.recipe.model_dump(mode="json")
    return json.dumps({section: dumped[section] for section in PLANNED}, sort_keys=True)


def _problems_of(member: Member, machine: Machine) -> list[str]:
    try:
        return [f"{member.name}: {problem}" for problem in make_plan(member.loaded, machine).problems]
    except FtlaunchError as error:
        return [f"{member.name}: {located(error, member.loaded.origins)}"]


def _deals(member: Member, machine: Machine) -> list[str]:
    """A batch size that cannot be dealt to the ranks."""
    recipe = member.loaded.recipe
    world = plan_world(recipe.cluster, machine)
    if isinstance(world, Unknown):
        return []
    try:
        plan_batch(recipe, world.ranks)
    except UserError as error:
        return [f"{member.name}: {error}"]
    return []


def _stands(member: Member, flags: Flags) -> list[str]:
    """A run that is alive, or was begun with other values."""
    decision = decide(gather(member.run, lambda _: None), as_stored(member.loaded), flags)
    return [decision.message] if decision.action in ("stop", "alive") else []
