"""Beginning and ending one attempt of a run, on rank 0. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..recipes.errors import UserError
from ..recipes.load import LoadedRecipe
from ..recipes.redact import dump_recipe, redact
from ..recipes.schema import Recipe
from . import storage
from .checkpoint.commit import CommitRecord, Report, latest, latest_resumable
from .model_files import pinned_revision
from .run_directory import RunDirectory

FORMAT = 1
"""Version of the run directory, of `state.json` and of the order of the data."""

USUAL_STREAMS = 16
"""Enough streams for the usual world sizes to divide them, few enough that each holds a real share of the data."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run. `resume` is the checkpoint it continues from, `streams` what the first start fixed."""

    run: RunDirectory
    number: int
    streams: int
    started_at: datetime
    """When the run first started; templates that print the date print this one."""
    resume: CommitRecord | None
    model_revision: str | None = None
    """Commit of a model from a hub, as the first start found it; None: the model is from elsewhere."""
    strategy: Mapping[str, Any] | None = None
    """What the model was laid out by in the attempt before; None: this is the first that got so far."""
    notes: tuple[str, ...] = field(default=())
    """Things about the run directory that the user should read."""
    recipe: str = ""
    """This attempt's, as it is stored."""

    @property
    def key(self) -> str:
        """What tells it from every other attempt of any run."""
        return f"{self.run.url} {self.number}"


def begin_attempt(loaded: LoadedRecipe, world_size: int, command: Sequence[str], began: float | None = None) -> Attempt:
    """Open the run's directory, claim an attempt (`began`: see `AttemptInfo`), and find where to continue.

    Raises UserError for a place that cannot be written or that holds something else.
    """
    recipe = loaded.recipe
    run = RunDirectory(storage.join(recipe.checkpoint.path, recipe.name))
    run.check()
    shown = [redact(word, loaded.secrets) for word in command]
    number = run.claim_attempt(world_size=world_size, command=shown, folder=str(Path.cwd()), began=began)
    text = dump_recipe(recipe, loaded.secrets)
    run.store_recipe(text)
    strategy = run.read_environment().get("strategy")
    run.write_environment(strategy=strategy)
    # Whoever starts ranks has decided that there is something to train, so an earlier end no longer counts.
    storage.delete_tree(run.path("result.json"))
    notes: list[str] = []
    resume = _where_to_go_on(run, notes.append)
    if resume is None:
        # Nothing depends on the facts of an attempt that saved nothing, and the recipe may have changed since.
        storage.delete_tree(run.path("facts.json"))
    facts = run.read_facts() or run.record_facts(_facts(recipe, world_size))
    started_at = datetime.fromisoformat(facts["started_at"])
    revision = facts["model_revision"]
    return Attempt(run, number, facts["streams"], started_at, resume, revision, strategy, tuple(notes), text)


def _where_to_go_on(run: RunDirectory, report: Report) -> CommitRecord | None:
    """The newest checkpoint with a training state. Raises UserError where only weights are left: beginning anew would
    throw away what was trained."""
    resume = latest_resumable(run.url, report)
    weights = latest(run.url, lambda _: None) if resume is None else None
    if weights is None:
        return resume
    raise UserError(
        f"{run.url}: no checkpoint is left that training can go on from; that of step {weights.step} holds its weights "
        "only (checkpoint.keep_training_state). Begin a new run on them, with --fresh and "
        f"model.path={run.path(weights.directory)}."
    )


def _facts(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What the first start fixes for the whole run."""
    return {
        "format": FORMAT,
        "streams": choose_streams(recipe, world_size),
        "seed": recipe.train.seed,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_revision": pinned_revision(recipe.model.path, recipe.model.revision),
    }


def take_over_recipe(attempt: Attempt) -> None:
    """From now on the run is what this attempt's recipe says; on rank 0. Not before the changes that the user accepted
    have proved to fit what was saved: an attempt that is refused must leave the run as it was, and so must one that is
    superseded meanwhile, which raises Superseded."""
    attempt.run.check_newest(attempt.number)
    if attempt.run.read_recipe() != attempt.recipe:
        attempt.run.replace_recipe(attempt.recipe, attempt.number)


def choose_streams(recipe: Recipe, world_size: int) -> int:
    """Logical streams of a new run: the recipe's, or the largest divisor of the global batch that is not above
    max(16, world size). Nothing else may count, or a change of layout would change what a step trains on."""
    if recipe.data.streams is not None:
        return recipe.data.streams
    batch = recipe.train.global_batch_size
    return max(n for n in range(1, min(batch, max(USUAL_STREAMS, world_size)) + 1) if batch % n == 0)
