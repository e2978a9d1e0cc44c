"""How many steps, epochs and tokens a run will take: said by the recipe, counted, estimated from a sample, or unknown.
Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..recipes.schema import EvalSplit, Recipe, TrainSource
from .plan_data import SourcePlan
from .unknown import Unknown, then

NEEDS_SAMPLE = Unknown("how long the samples are; `--sample` estimates it")


@dataclass(frozen=True)
class SampleStats:
    """What a sample of a source's rows became: per row read, the samples (pieces of a split document count each) and
    the tokens that go into training, and the bytes a row takes in its file."""

    rows: int
    samples_per_row: float
    tokens_per_row: float
    bytes_per_row: float


@dataclass(frozen=True)
class DurationPlan:
    """How long a run is. `exact`: the recipe names the steps; otherwise numbers are estimates."""

    steps: int | Unknown
    steps_per_epoch: float | Unknown
    epochs: float | Unknown
    tokens: int | Unknown
    exact: bool


@dataclass(frozen=True)
class Epoch:
    """One epoch over all training sources."""

    samples: float | Unknown
    tokens: float | Unknown


Stats = Mapping[str, SampleStats]


def plan_duration(
    recipe: Recipe, sources: Sequence[SourcePlan | Unknown], stats: Stats, unsampled: Unknown = NEEDS_SAMPLE
) -> DurationPlan:
    """`sources` are the training sources in the recipe's order; `stats` are by source name, `unsampled` says why one
    has none."""
    epoch = plan_epoch(recipe, sources, stats, unsampled)
    per_epoch = steps_per_epoch(recipe, epoch)
    steps = _first_end(recipe, per_epoch, epoch)
    epochs = _divide(steps, per_epoch)
    return DurationPlan(
        steps=steps,
        steps_per_epoch=per_epoch,
        epochs=epochs,
        tokens=then(_times(epochs, epoch.tokens), round),
        exact=recipe.train.max_steps is not None and steps == recipe.train.max_steps,
    )


def plan_epoch(recipe: Recipe, sources: Sequence[SourcePlan | Unknown], stats: Stats, unsampled: Unknown) -> Epoch:
    """Samples and tokens of one epoch. With weights it ends with the primary source, and the others give their
    share of the samples."""
    unreachable = next((source for source in sources if isinstance(source, Unknown)), None)
    if unreachable:
        return Epoch(unreachable, unreachable)
    known = [source for source in sources if isinstance(source, SourcePlan)]
    samples = [_samples(recipe, source, stats.get(source.name), unsampled) for source in known]
    lengths = [_mean_length(stats.get(source.name), unsampled) for source in known]
    if recipe.data.train[0].weight is not None:
        samples = _drawn(recipe, samples)
    else:
        passes = [_passes(source, recipe) for source in recipe.data.train]
        samples = [_times(count, each or 1.0) for count, each in zip(samples, passes, strict=True)]
    return Epoch(
        _total(samples), _total([_times(count, length) for count, length in zip(samples, lengths, strict=True)])
    )


def _samples(recipe: Recipe, source: SourcePlan, stats: SampleStats | None, unsampled: Unknown) -> float | Unknown:
    """Samples that one pass over a source gives."""
    rows: float | Unknown = source.rows
    if isinstance(rows, Unknown) and stats is not None and stats.bytes_per_row:
        rows = source.bytes / stats.bytes_per_row
    elif isinstance(rows, Unknown) and unsampled is not NEEDS_SAMPLE:
        rows = unsampled  # a sample was asked for, so advice to ask for one would be odd
    kept = 1 - recipe.data.eval.fraction if isinstance(recipe.data.eval, EvalSplit) else 1.0
    return _times(rows, kept * (stats.samples_per_row if stats else 1.0))


def _mean_length(stats: SampleStats | None, unsampled: Unknown) -> float | Unknown:
    """Tokens per sample."""
    if stats is None:
        return unsampled
    return stats.tokens_per_row / stats.samples_per_row if stats.samples_per_row else 0.0


def _passes(source: TrainSource, recipe: Recipe) -> float | None:
    """Passes over a source in each epoch of the run; None: as many as it takes."""
    if source.num_epochs is not None:
        return source.num_epochs / (recipe.train.num_epochs or 1)
    return None if source.repeat else 1.0


def _drawn(recipe: Recipe, samples: Sequence[float | Unknown]) -> list[float | Unknown]:
    """Samples drawn from each source until the primary one ends."""
    sources = recipe.data.train
    primary = next((number for number, source in enumerate(sources) if source.primary), 0)
    per_weight = _divide(samples[primary], sources[primary].weight or 1.0)
    drawn = [_times(per_weight, source.weight or 0.0) for source in sources]
    passes = [_passes(source, recipe) for source in sources]
    return [
        wanted if most is None else _smaller(wanted, _times(there, most))
        for most, wanted, there in zip(passes, drawn, samples, strict=True)
    ]


def steps_per_epoch(recipe: Recipe, epoch: Epoch) -> float | Unknown:
    """Optimizer steps that one epoch makes, as a fraction. Packed sequences are taken to be full: the packer fills
    99.9 % of them."""
    batch = recipe.train.global_batch_size
    if recipe.data.packing:
        return _divide(epoch.tokens, float(recipe.data.sequence_length * batch))
    return _divide(epoch.samples, float(batch))


def _first_end(recipe: Recipe, per_epoch: float | Unknown, epoch: Epoch) -> int | Unknown:
    """Steps until the first of the ends that the recipe names."""
    train = recipe.train
    ends: list[float | Unknown] = []
    if train.max_steps is not None:
        ends.append(train.max_steps)
    if train.max_tokens is not None:
        ends.append(_times(_divide(float(train.max_tokens), epoch.tokens), per_epoch))
    if train.num_epochs is not None or not ends:
        ends.append(_times(per_epoch, float(train.num_epochs or 1)))
    unknown = next((end for end in ends if isinstance(end, Unknown)), None)
    # A small excess is the rounding of the quotient, not another step.
    return unknown or min(max(1, math.ceil(end - 1e-9)) for end in ends if not isinstance(end, Unknown))


# --- arithmetic in which an unknown operand makes an unknown result -------------------------------------------------


def _apply(
    operation: Callable[[float, float], float], left: float | Unknown, right: float | Unknown
) -> float | Unknown:
    return then(left, lambda a: then(right, lambda b: operation(a, b)))


def _times(left: float | Unknown, right: float | Unknown) -> float | Unknown:
    return _apply(lambda a, b: a * b, left, right)


def _divide(left: float | Unknown, right: float | Unknown) -> float | Unknown:
    if right == 0:
        return Unknown("the sample holds nothing to learn from; see `ftlaunch check`")
    return _apply(lambda a, b: a / b, left, right)


def _smaller(left: float | Unknown, right: float | Unknown) -> float | Unknown:
    return _apply(min, left, right)


def _total(values: Sequence[float | Unknown]) -> float | Unknown:
    total: float | Unknown = 0.0
    for value in values:
        total = _apply(lambda a, b: a + b, total, value)
    return total
