"""`ftlaunch recipes`: the recipes that come with the package."""

from __future__ import annotations

import difflib
import json
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from ..recipes.errors import UserError
from ..recipes.json_schema import schema_json

EDITOR_HEADER = "yaml-language-server"
SCHEMA_FILE = "recipe.schema.json"
"""What the recipes' first line tells editors to complete them with."""


def packaged_recipes() -> dict[str, str]:
    """Name -> text of each recipe that comes with ftlaunch."""
    folder = files("ftlaunch.recipes")
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in found}


def headline(text: str) -> str:
    """A recipe's first comment that says something, which is what it is for."""
    comments = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return next((comment.rstrip() for comment in comments if comment and not comment.startswith(EDITOR_HEADER)), "")


def show_recipes(name: str | None, file: Path | None) -> int:
    """List all, print one, or copy one to `file`. Raises UserError for an unknown name or an existing file."""
    recipes = packaged_recipes()
    if name is None:
        _show_list(recipes)
        return 0
    text = _find(recipes, name)
    if file is None:
        print(text, end="")
        return 0
    _copy(text, file)
    _write_schema(file.parent / SCHEMA_FILE)
    print(f"wrote {file}; next: set data.train in it to your own rows, then `ftlaunch check {file}` shows them")
    return 0


def _show_list(recipes: dict[str, str]) -> None:
    width = max(map(len, recipes), default=0)
    for name, text in recipes.items():
        print(f"{name:{width}}  {headline(text)}")
    print("\n`ftlaunch recipes NAME` prints one, `ftlaunch recipes NAME FILE` copies it")


def _find(recipes: dict[str, str], name: str) -> str:
    wanted = name.removesuffix(".yaml")
    if wanted in recipes:
        return recipes[wanted]
    near = difflib.get_close_matches(wanted, recipes, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(recipes)}"
    raise UserError(f"no recipe named {name!r} comes with ftlaunch{hint}")


def _copy(text: str, file: Path) -> None:
    if not file.parent.is_dir():
        raise UserError(f"cannot write {file}: {file.parent} is not a folder")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as error:
        raise UserError(f"{file} exists and is not overwritten; choose another name") from error
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def _write_schema(file: Path) -> None:
    """Beside the recipe, where its first line looks for it; one that is there stays."""
    if not file.exists():
        with suppress(OSError):  # the recipe is there, and is as good without
            file.write_text(json.dumps(schema_json(), indent=2) + "\n", encoding="utf-8")
