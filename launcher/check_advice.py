"""Advice on the recipe, given what its data turned out to be. One small rule each; figures come with their source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..recipes.schema import EvalSplit, Recipe
from .check_fill import Fill
from .check_findings import Finding, about
from .check_tally import Tally, quantile
from .plan_duration import DurationPlan
from .unknown import Unknown

FEW_EXAMPLES = 100
FEW_STEPS = 20
SHORT_SHARE = 0.05
"""Share of samples beyond the sequence length from which on it is called short."""

LONG_FACTORS = {True: 32, False: 4}
"""Sequence length by longest sample from which on it is called long, with packing and without."""

MUCH_SAVED = 0.5
"""Sequences that packing needs, by samples, below which it saves much."""


class Rates(NamedTuple):
    """The usual learning rates with AdamW; FAR times beyond them is far."""

    low: float
    high: float


FAR = 4.0
USUAL_RATES = {
    ("sft", False): Rates(1e-5, 5e-5),  # Llama 2, Alpaca and Vicuna 2e-5, Tulu 3 5e-6
    ("sft", True): Rates(1e-4, 3e-4),  # LoRA about ten times full: Dettmers et al. 2023 (2e-4), Biderman et al. 2024
    ("cpt", False): Rates(1e-5, 3e-4),  # up to the rate of pretraining: Ibrahim et al. 2024
    ("cpt", True): Rates(1e-4, 5e-4),
}
"""By (method, with an adapter). Methods that are not here have no usual rate."""

MOST_EPOCHS = {
    ("sft", False): 5.0,
    ("sft", True): 10.0,
    ("cpt", False): 4.0,  # Muennighoff et al. 2023: up to four passes are nearly as good as new text
    ("cpt", True): 4.0,
}


@dataclass(frozen=True)
class Overview:
    """What the rules see. `fill` None: nothing to fill sequences with."""

    recipe: Recipe
    tallies: Sequence[Tally]
    duration: DurationPlan
    fill: Fill | None

    @property
    def kind(self) -> tuple[str, bool]:
        """(method, with an adapter)."""
        return self.recipe.method.type, self.recipe.adapter is not None

    @property
    def training(self) -> list[Tally]:
        """The training sources."""
        return [tally for tally in self.tallies if tally.side == "train"]

    def lengths(self, *, also_split: bool) -> list[int]:
        """Tokens of the training samples, before anything is cut; with those of documents, which are split."""
        return [length for tally in self.training if also_split or not tally.is_split for length in tally.lengths]


def no_eval(seen: Overview) -> Iterator[Finding]:
    """Without held-out rows overfitting cannot be seen."""
    if not isinstance(seen.recipe.data.eval, EvalSplit) and not seen.recipe.data.eval:
        yield Finding("no-eval", "data.eval", "nothing is held out")


def learning_rate(seen: Overview) -> Iterator[Finding]:
    """Far from what is usual for method and adapter; random weights have no usual rate."""
    usual, rate = USUAL_RATES.get(seen.kind), seen.recipe.train.learning_rate
    if usual is None or seen.recipe.model.init == "random":
        return
    how = f"{seen.kind[0]} with {'an adapter' if seen.kind[1] else 'all weights'}"
    text = f"{rate:g}; {usual.low:g} to {usual.high:g} is usual for {how}"
    if rate > FAR * usual.high:
        yield about("learning-rate-high", "train.learning_rate", text)
    if rate < usual.low / FAR:
        yield about("learning-rate-low", "train.learning_rate", text)


def few_examples(seen: Overview) -> Iterator[Finding]:
    """Too few to learn more than the examples themselves."""
    samples = sum(tally.estimated_samples for tally in seen.training)
    all_seen = len(seen.training) == len(seen.recipe.data.train)
    if all_seen and 0 < samples < FEW_EXAMPLES and seen.kind[0] != "cpt":
        yield about("few-examples", "data.train", f"{samples:,.0f}")


def many_epochs(seen: Overview) -> Iterator[Finding]:
    """More passes than such a training usually gains from."""
    epochs, most = seen.duration.epochs, MOST_EPOCHS.get(seen.kind)
    if not isinstance(epochs, Unknown) and most is not None and epochs > most + 0.5:
        how = f"{seen.kind[0]} with {'an adapter' if seen.kind[1] else 'all weights'}"
        yield about("many-epochs", "train.num_epochs", f"about {epochs:.1f}; more than {most:g} rarely help {how}")


def few_steps(seen: Overview) -> Iterator[Finding]:
    """The schedule needs some steps to go up and down."""
    steps = seen.duration.steps
    if not isinstance(steps, Unknown) and steps < FEW_STEPS:
        batch = seen.recipe.train.global_batch_size
        yield about("few-steps", "train.global_batch_size", f"about {steps}, of {batch} sequences each")


def repeated_sources(seen: Overview) -> Iterator[Finding]:
    """Weights, or passes of its own, that make a small source come again and again."""
    most = MOST_EPOCHS.get(seen.kind)
    if most is None or len(seen.training) != len(seen.recipe.data.train):
        return
    for number, tally in enumerate(seen.training):
        passes = _passes(seen, number)
        if passes > most + 0.5:
            yield about("repeated-source", tally.name, f"about {passes:.1f} times in the run")


def _passes(seen: Overview, number: int) -> float:
    """Passes over a source in the run, where they are its own affair and not just the run's epochs; else 0."""
    sources, epochs = seen.recipe.data.train, seen.duration.epochs
    source, primary = sources[number], next((place for place, each in enumerate(sources) if each.primary), 0)
    if source.num_epochs is not None:
        return source.num_epochs
    if isinstance(epochs, Unknown) or source.weight is None or not source.repeat or number == primary:
        return 0.0
    there = seen.training[number].estimated_samples
    share = source.weight / (sources[primary].weight or 1.0)
    return epochs * seen.training[primary].estimated_samples * share / there if there else 0.0


def sequence_length(seen: Overview) -> Iterator[Finding]:
    """Far above or below the lengths seen."""
    whole, limit = seen.lengths(also_split=False), seen.recipe.data.sequence_length
    beyond = sum(length > limit for length in whole)
    if beyond > SHORT_SHARE * len(whole):
        text = (
            f"{beyond / len(whole):.0%} of the samples are longer than {limit:,}; {quantile(whole, 0.99):,} holds 99%"
        )
        yield about("sequence-short", "data.sequence_length", text)
    longest = max(seen.lengths(also_split=True), default=limit)
    if limit > LONG_FACTORS[seen.recipe.data.packing] * longest:
        yield about("sequence-long", "data.sequence_length", f"{limit:,}; the longest sample has {longest:,} tokens")


def packing_off(seen: Overview) -> Iterator[Finding]:
    """Short samples in sequences of their own."""
    if seen.fill and not seen.recipe.data.packing and seen.fill.sequences_per_100 < 100 * MUCH_SAVED:
        text = f"100 samples would fit into {seen.fill.sequences_per_100:.0f} sequences"
        yield about("packing-off", "data.packing", text)


def no_replay(seen: Overview) -> Iterator[Finding]:
    """Full fine-tuning on one source for several epochs forgets most (Luo et al. 2023, arXiv:2308.08747)."""
    epochs = seen.duration.epochs
    several = not isinstance(epochs, Unknown) and epochs >= 2
    if seen.kind == ("sft", False) and len(seen.training) == 1 and several and seen.recipe.model.init == "pretrained":
        yield Finding("no-replay", "data.train", "one source, full fine-tuning, several epochs: general abilities fade")


RULES = (
    no_eval,
    learning_rate,
    few_examples,
    many_epochs,
    few_steps,
    repeated_sources,
    sequence_length,
    packing_off,
    no_replay,
)


def advise(seen: Overview) -> list[Finding]:
    """What all rules find."""
    return [finding for rule in RULES for finding in rule(seen)]
