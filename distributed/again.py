"""What starting a recipe means for a run that is there already: gather the facts, then decide (which is pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..recipes.compare import Change, Comparison, compare
from ..recipes.load import parse_recipe_text
from ..recipes.schema import Recipe
from .checkpoint.commit import Report, latest_resumable
from .run_directory import AttemptInfo, RunDirectory

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
    """What the user allowed: a new run beside the old one, changes of what shapes the training,
    files that are no longer what they were."""

    fresh: bool = False
    accept_changes: bool = False
    accept_changed_data: bool = False


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
    newest = latest_resumable(run.url, report)
    return Facts(
        recipe=parse_recipe_text(text, run.path("recipe.yaml")),
        step=newest.step if newest else None,
        finished=run.read_result() is not None,
        alive=run.live_attempt(),
    )


def decide(facts: Facts, new: Recipe, flags: Flags) -> Decision:
    """What running `new` means for a run with these facts; with `fresh` the facts are those of a free name."""
    if facts.alive is not None:
        return Decision("alive", _alive(new.name, facts.alive))
    if facts.recipe is None:
        return Decision("new", f"new run {new.name}")
    comparison = compare(facts.recipe, new)
    # Without a checkpoint nothing is lost by other values: the first try may have failed on the one that was wrong.
    has_trained = facts.step is not None or facts.finished
    if comparison.stops and has_trained and not flags.accept_changes:
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
