"""What `ftlaunch recipe.yaml` does with a run that is there already: gather the facts, then decide (which is pure)."""

from __future__ import annotations

import difflib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..distributed import storage
from ..distributed.checkpoint.commit import Report, latest
from ..distributed.run_directory import AttemptInfo, RunDirectory
from ..recipes.compare import Change, Comparison, compare
from ..recipes.errors import UserError
from ..recipes.load import LoadedRecipe, parse_recipe_text
from ..recipes.redact import dump_recipe
from ..recipes.schema import Recipe

DEFAULT_RUNS = "runs"
"""Where a bare RUN name on the command line is looked for."""

Action = Literal["new", "continue", "extend", "finished", "stop", "alive"]


@dataclass(frozen=True)
class Facts:
    """What is known of a run. `recipe` is the stored one (None: there is no run yet), `step` that of its newest usable
    checkpoint, `alive` the attempt that still runs."""

    recipe: Recipe | None = None
    step: int | None = None
    finished: bool = False
    alive: AttemptInfo | None = None


@dataclass(frozen=True)
class Flags:
    """What the user allowed: a new run beside the old one, or changes of what shapes the training."""

    fresh: bool = False
    accept_changes: bool = False


@dataclass(frozen=True)
class Decision:
    """What will be done. `changes` are those to list; `message` says it in words. "new", "continue" and "extend" train;
    "finished" shows the summary; "stop" and "alive" are refusals."""

    action: Action
    message: str
    changes: tuple[Change, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether ranks are started."""
        return self.action in ("new", "continue", "extend")


def gather(run: RunDirectory, report: Report) -> Facts:
    """Look at a run directory."""
    text = run.read_recipe()
    if text is None:
        return Facts(alive=run.live_attempt())
    newest = latest(run.url, report)
    return Facts(
        recipe=parse_recipe_text(text, run.path("recipe.yaml")),
        step=newest.step if newest else None,
        finished=run.read_result() is not None,
        alive=run.live_attempt(),
    )


def as_stored(loaded: LoadedRecipe) -> Recipe:
    """The recipe as a run directory would give it back: a secret must not look like a change."""
    return parse_recipe_text(dump_recipe(loaded.recipe, loaded.secrets), loaded.path)


def decide(facts: Facts, new: Recipe, flags: Flags) -> Decision:
    """What running `new` means for a run with these facts; with `fresh` the facts are those of a free name."""
    if facts.alive is not None:
        return Decision("alive", _alive(new.name, facts.alive))
    if facts.recipe is None:
        return Decision("new", f"new run {new.name}")
    comparison = compare(facts.recipe, new)
    if comparison.stops and not flags.accept_changes:
        return Decision("stop", _stop(new.name, comparison), comparison.stops)
    if facts.finished and not comparison.extends:
        return Decision("finished", f"run {new.name} is finished (step {facts.step})", comparison.changes)
    if facts.finished:
        return Decision("extend", f"extending run {new.name} from step {facts.step}", comparison.changes)
    return Decision("continue", _continue(new.name, facts.step), comparison.changes)


def _alive(name: str, attempt: AttemptInfo) -> str:
    return (
        f"run {name} is running: attempt {attempt.number} on {attempt.process.host} (process {attempt.process.pid}), "
        f"since {attempt.started_at}. Stop it there, or begin another run with --fresh."
    )


def _stop(name: str, comparison: Comparison) -> str:
    lines = "\n".join(f"  {change}" for change in comparison.stops)
    return (
        f"run {name} was begun with other values:\n{lines}\n"
        "Begin a new run with --fresh, go on with the new values with --accept-changes, or set them back."
    )


def _continue(name: str, step: int | None) -> str:
    if step is None:
        return f"continuing run {name} from its beginning: it has no checkpoint yet"
    return f"continuing run {name} from step {step}"


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
    near = difflib.get_close_matches(text, names, n=3) or names[:5]
    if not near:
        return f": {runs} holds none. Give a name under ./{DEFAULT_RUNS}, a path, or a URL."
    return f" under ./{DEFAULT_RUNS}; did you mean {' or '.join(near)}?"
