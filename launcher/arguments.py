"""What the words of a command line are, before any command parses them. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from ..recipes.errors import UserError

OPTIONS_WITH_VALUES = frozenset(
    {
        "--nodes",
        "--gpus-per-node",
        "--cluster",
        "--max-new-tokens",
        "--temperature",
        "--rows",
        "--samples",
        "--seed",
        "--report",
        "--to",
        "--dtype",
        "--gguf-converter",
        "--steps",
        "--ranks",
        "--rank",
        "--sweep",
        "--at-once",
        "--name",
        "--base",
    }
)
"""Options whose next word is their value, over all verbs: a verb may come after them."""

RECIPE_SUFFIXES = (".yaml", ".yml")


def arrange(words: Sequence[str], verbs: Sequence[str], folder: Path) -> list[str]:
    """The words with the verb, if there is one, moved to the front: `--nodes 2 plan r.yaml` becomes
    `plan --nodes 2 r.yaml`. Raises UserError for a first argument that is neither a verb nor a file in `folder`."""
    place = _first_argument(words)
    if place is None:
        return list(words)
    word = words[place]
    if word in verbs:
        return [word, *words[:place], *words[place + 1 :]]
    _must_be_file(word, verbs, folder)
    return list(words)


def _first_argument(words: Sequence[str]) -> int | None:
    """Index of the first word that is neither an option nor an option's value."""
    place = 0
    while place < len(words):
        word = words[place]
        if not word.startswith("-"):
            return place
        place += 2 if word in OPTIONS_WITH_VALUES else 1
    return None


def _must_be_file(word: str, verbs: Sequence[str], folder: Path) -> None:
    path = folder / word
    if path.is_file():
        return
    if path.is_dir():
        raise UserError(f"{word} is a folder; give a recipe file" + _did_you_mean(word, [], path, prefix=f"{word}/"))
    raise UserError(
        f"{word!r} is neither a recipe file nor a command"
        + _did_you_mean(word, verbs, folder)
        + f"\ncommands: {', '.join(verbs)}; `ftlaunch recipes` lists recipes to start from"
    )


def _did_you_mean(word: str, verbs: Sequence[str], folder: Path, prefix: str = "") -> str:
    files = recipe_files(folder)
    near = difflib.get_close_matches(word, [*verbs, *files], n=3, cutoff=0.6) or files[:3]
    return f"; did you mean {' or '.join(prefix + name for name in near)}?" if near else ""


def recipe_files(folder: Path) -> list[str]:
    """Names of the YAML files that lie in `folder`."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in RECIPE_SUFFIXES and path.is_file())
