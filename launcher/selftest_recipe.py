"""The recipes that `ftlaunch selftest` runs: the user's own, cut down to a few steps that are thrown away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..distributed.attempt import choose_streams
from ..recipes.checks import run_checks
from ..recipes.schema import Checkpoint, Data, EvalSplit, Evaluate, Recipe, Source, Track, Train
from ..recipes.schema_strategy import Deepspeed
from .selftest_layouts import Layout

SMALL_BATCH, SMALL_SEQUENCE = 10, 512
"""Sequences of a step, and tokens of a sequence, with --scale-down: few enough for a CPU. Neither 3 nor 4 ranks divide
the batch, so that padding is tried too."""

PREPARED = "tokenized"


def trial_recipe(recipe: Recipe, model: str, steps: int, ranks: int, folder: Path, *, scale_down: bool) -> Recipe:
    """What all layouts have in common. `model` is a folder or URL. The rate is the recipe's highest from the first step
    on: while it warms up hardly anything would move that could differ. Nothing is evaluated, saved or tracked."""
    train = recipe.train.model_copy(
        update={
            **_COUNTED_IN_STEPS,
            "max_steps": steps,
            "lr_scheduler": "constant",
            **(_small_batch(recipe.train, ranks) if scale_down else {}),
        }
    )
    data = _small_sequences(recipe.data) if scale_down else recipe.data
    trial = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": model, "revision": None, **_tokenizer(recipe, model)}),
            "train": train,
            "data": data.model_copy(
                update={
                    "train": tuple(source.model_copy(update={"num_epochs": None}) for source in data.train),
                    # Rows that are held out by a fraction are not trained on here either.
                    "eval": data.eval if isinstance(data.eval, EvalSplit) else (),
                }
            ),
            "evaluate": Evaluate(at_start=False, at_end=False),
            "checkpoint": Checkpoint(path=str(folder), mode="sync"),
            "track": Track(tensorboard=False),
        }
    )
    # The same for all: by itself a run fits the number of streams to its first ranks.
    streams = choose_streams(trial, ranks)
    return trial.model_copy(update={"data": trial.data.model_copy(update={"streams": streams})})


_COUNTED_IN_STEPS: Mapping[str, Any] = {
    "num_epochs": None,
    "max_tokens": None,
    "warmup_steps": None,
    "warmup_ratio": 0.0,
    "decay_ratio": Train.model_fields["decay_ratio"].default,
}


def _tokenizer(recipe: Recipe, model: str) -> dict[str, str]:
    """A tokenizer's place, where it is beside another model than the one that is trained here."""
    return {} if recipe.model.tokenizer is None else {"tokenizer": recipe.model.tokenizer}


def _small_batch(train: Train, ranks: int) -> dict[str, int]:
    batch = min(train.global_batch_size, max(SMALL_BATCH, ranks + 2))
    return {"global_batch_size": batch, "micro_batch_size": min(train.micro_batch_size, batch)}


def _small_sequences(data: Data) -> Data:
    """Shorter sequences; rows that no longer fit lose their beginning, since the end is what is learned. Rows that were
    tokenised ahead have the length they were prepared for."""
    if any(source.format == PREPARED for source in data.train):
        return data
    cut = tuple(source.model_copy(update={"overlong": _cut(source, data)}) for source in data.train)
    return data.model_copy(update={"sequence_length": min(data.sequence_length, SMALL_SEQUENCE), "train": cut})


def _cut(source: Source, data: Data) -> str:
    chosen = source.overlong or data.overlong
    return "truncate_left" if chosen in (None, "drop", "error") else chosen


def laid_out(trial: Recipe, layout: Layout, name: str) -> Recipe:
    """The trial in one layout, as a run of this name."""
    return trial.model_copy(
        update={
            "name": name,
            "strategy": layout.strategy,
            "model": trial.model.model_copy(update={"dtype": layout.dtype}),
            "train": trial.train.model_copy(update={"micro_batch_size": layout.micro_batch_size}),
        }
    )


def obstacles(recipe: Recipe) -> Iterator[str]:
    """Why this recipe cannot be laid out this way."""
    if isinstance(recipe.strategy, Deepspeed) and find_spec("deepspeed") is None:
        yield "deepspeed is not installed: pip install 'ftlaunch[deepspeed]'"
    yield from (f"{problem.key}: {problem.message}" for problem in run_checks(recipe))
