"""`ftlaunch download RECIPE`: on a machine that reaches the internet, for nodes that do not. What was fetched is named,
and a recipe is written that reads it from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ...distributed.model_files import is_hub_id
from ...recipes.errors import UserError
from ...recipes.load import LoadedRecipe
from ...recipes.naming import source_names
from ...recipes.redact import dump_as_written, redact, written_values
from ...recipes.schema import EvalSplit, Recipe
from .. import units
from .fetch import Fetched, fetch_files, fetch_model, total
from .ledger import Downloads
from .wanted import WantedSource, wanted_sources

MADE = "# Made by `ftlaunch download`"
"""Begins a recipe that may be written over."""

SUFFIX = ".downloaded.yaml"


def download(loaded: LoadedRecipe, to: Path, *, everything: bool) -> int:
    """Fetch what lies outside, and write the recipe that reads it from `to`. Raises UserError, InfrastructureError."""
    recipe, console = loaded.recipe, Console()

    def say(line: str) -> None:
        console.print(Text(redact(line, loaded.secrets)), soft_wrap=True, highlight=False)

    beside = Path(loaded.path).with_suffix(SUFFIX)
    _refuse_other_file(beside)
    to = to.absolute()
    to.mkdir(parents=True, exist_ok=True)
    downloads = Downloads(to)
    changes, models = _models(recipe, downloads, say, everything=everything)
    sources = wanted_sources(recipe, everything=everything)
    for source in sources:
        say(f"{source.key}: {len(source.files)} files")
    rows = fetch_files(downloads, (file for source in sources for file in source.files), say)
    counts = total([*models, rows])
    if not changes and not sources:
        say("nothing lies outside: model and data are files here, or in object stores (--everything fetches those too)")
        return 0
    _write_recipe(loaded, beside, _values(recipe, to, changes, sources))
    fetched = f"fetched {counts.files} files, {units.size(counts.bytes)}" if counts.files else "nothing to fetch"
    kept = f"; {counts.kept_files} files, {units.size(counts.kept_bytes)}, were there" if counts.kept_files else ""
    say(f"{fetched}{kept}: {to}")
    for key, place in changes.items():
        say(f"  {key}: {to / place}")
    for source in sources:
        say(f"  {source.key}.path: {len(source.files)} files below {to / 'data'}")
    say(f"train on it, where {to} is in reach: ftlaunch {beside}")
    return 0


def _models(
    recipe: Recipe, downloads: Downloads, say: Any, *, everything: bool
) -> tuple[dict[str, str], list[Fetched]]:
    """Key of the recipe -> place of the model or tokenizer that it names, for those that lie outside."""
    model = recipe.model
    wanted = [("model.path", model.path, model.revision, model.init == "pretrained")]
    if model.tokenizer is not None:
        wanted.append(("model.tokenizer", model.tokenizer, None, False))
    changes, counts = {}, []
    for key, path, revision, weights in wanted:
        if is_hub_id(path) or (everything and "://" in path):
            say(f"{key}: {path}")
            place, fetched = fetch_model(
                downloads, path, revision, weights=weights, pickles=weights and model.allow_pickle
            )
            changes[key] = place
            counts.append(fetched)
    return changes, counts


def _values(recipe: Recipe, to: Path, changes: dict[str, str], sources: list[WantedSource]) -> dict[str, Any]:
    """The recipe over the folder. Sources keep the names that were made from their paths, and the order of files."""
    values = written_values(recipe)
    values["name"] = recipe.name
    for key, place in changes.items():
        values["model"][key.partition(".")[2]] = str(to / place)
        if key == "model.path":
            values["model"].pop("revision", None)
    held_out = () if isinstance(recipe.data.eval, EvalSplit) else recipe.data.eval
    names = {"train": source_names(recipe.data.train), "eval": source_names(held_out)}
    for source in sources:
        _, part, number = source.key.split(".")
        changed = values["data"][part][int(number)]
        for done in ("split", "subset", "storage_options"):
            changed.pop(done, None)
        paths = [str(to / file.place) for file in source.files]
        changed |= {"name": names[part][int(number)], "path": paths[0] if len(paths) == 1 else paths}
    return values


def _write_recipe(loaded: LoadedRecipe, beside: Path, values: dict[str, Any]) -> None:
    head = f"{MADE} from {Path(loaded.path).name}: nothing in it is fetched from outside.\n"
    beside.write_text(head + dump_as_written(values, loaded.secrets))


def _refuse_other_file(path: Path) -> None:
    """Only a recipe that was made here is written over."""
    if path.exists() and not path.read_text().startswith(MADE):
        raise UserError(f"{path} is there, and `ftlaunch download` did not make it. Move it, or rename the recipe.")
