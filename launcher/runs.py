"""Names of runs on the command line."""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path

from ..distributed import storage
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import UserError

DEFAULT_RUNS = "runs"
"""Where a bare RUN name on the command line is looked for."""


def fresh_name(name: str, taken: set[str]) -> str:
    """The first of NAME, NAME-2, NAME-3, … that is free; `bot-2` goes on to `bot-3`, not to `bot-2-2`."""
    stem = re.sub(r"-\d+$", "", name) if name in taken else name
    candidates = itertools.chain([name], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def find_run(text: str, folder: Path) -> str:
    """The URL of RUN: a name under `folder`/runs, a path, or a URL. Raises UserError with near names."""
    if "://" in text:
        if RunDirectory(text).status() == "new":
            raise UserError(f"{text} is no run of ftlaunch")
        return text
    candidates = [Path(text)] if Path(text).is_absolute() else [folder / DEFAULT_RUNS / text, folder / text]
    for path in candidates:
        if path.is_dir() and RunDirectory(str(path)).status() != "new":
            return str(path)
    raise UserError(f"there is no run {text!r}" + _runs_there(text, folder / DEFAULT_RUNS))


def _runs_there(text: str, runs: Path) -> str:
    names = storage.list_names(str(runs))
    if near := difflib.get_close_matches(text, names, n=3):
        return f" under ./{DEFAULT_RUNS}; did you mean {' or '.join(near)}?"
    there = f"there are {', '.join(names[:5])}" if names else "it holds none"
    return f" under ./{DEFAULT_RUNS}; {there}. Give a name under it, a path, or a URL."


def short_name(url: str) -> str:
    """What the user may call a run: its bare name if it lies under ./runs, otherwise its URL."""
    if storage.is_local(url):
        path = storage.local_path(url).absolute()
        if path.parent == Path.cwd() / DEFAULT_RUNS:
            return path.name
    return url
