"""Whether two layouts trained alike, and what it may mean if not. Pure.

The loss of a step is one sum over the global batch divided by one weight, so a layout changes nothing but the order in
which numbers are added up. How far that may go is known: the tolerances below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Tolerance(NamedTuple):
    """Largest relative difference of losses and of gradient norms: of the first step, and of those behind it."""

    first: float
    later: float


TOLERANCE = Tolerance(1e-5, 2e-4)
"""fp32 rounds at 6e-8. A sum over a batch, or a norm over a model, gathers some 1e-7 to 1e-6 of that; 1e-5 is ten times
more, and the smallest mistake in a divisor, one token of a hundred thousand, as much. Behind the first step the updates
feed the difference back (Adam turns a gradient near zero into a whole step of one sign or the other): 5e-5 were seen
after 20 steps, under plain DDP too. In bfloat16 the same holds between layouts whose matrices have the same shapes."""

Outcome = Literal["agrees", "differs", "layout-bound", "other dropout"]


@dataclass(frozen=True)
class Curve:
    """What the steps of a layout gave."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    """Before clipping."""
    tokens: tuple[float, ...]
    """Supervised ones: the weight that a step's loss is divided by."""


@dataclass(frozen=True)
class Verdict:
    """`loss` and `grad_norm`: largest relative differences over all steps. `where`: what was out of tolerance, in
    words."""

    outcome: Outcome
    loss: float
    grad_norm: float
    where: str = ""


def judge(curve: Curve, reference: Curve, *, layout_bound: bool = False, other_dropout: bool = False) -> Verdict:
    """Compare. An optimizer that is bound to the layout has not done anything before the first step's loss and norm, so
    these must agree all the same. Where other values are dropped only the data can be compared."""
    losses = _differences(curve.losses, reference.losses)
    norms = _differences(curve.grad_norms, reference.grad_norms)
    say = _Said(max(losses, default=0.0), max(norms, default=0.0))
    if curve.tokens != reference.tokens:
        return say("differs", _other_data(curve.tokens, reference.tokens))
    if other_dropout:
        return say("other dropout")
    looked_at = 1 if layout_bound else len(losses)
    beyond = list(_beyond(losses[:looked_at], norms[:looked_at]))
    if beyond:
        return say("differs", beyond[0])
    return say("layout-bound" if layout_bound else "agrees")


class _Said(NamedTuple):
    loss: float
    grad_norm: float

    def __call__(self, outcome: Outcome, where: str = "") -> Verdict:
        return Verdict(outcome, self.loss, self.grad_norm, where)


def _differences(values: Sequence[float], expected: Sequence[float]) -> list[float]:
    return [_relative(value, other) for value, other in zip(values, expected, strict=False)]


def _relative(value: float, expected: float) -> float:
    if value == expected:
        return 0.0
    difference = abs(value - expected) / max(abs(expected), 1e-30)
    return difference if math.isfinite(difference) else math.inf


def _other_data(tokens: Sequence[float], expected: Sequence[float]) -> str:
    if len(tokens) != len(expected):
        return f"{len(tokens)} steps, where the reference took {len(expected)}"
    step = next(n for n, pair in enumerate(zip(tokens, expected, strict=True), 1) if pair[0] != pair[1])
    return f"step {step} learns from {tokens[step - 1]:g} tokens, the reference's from {expected[step - 1]:g}"


def _beyond(losses: Sequence[float], norms: Sequence[float]) -> Iterator[str]:
    """What is out of tolerance, the earliest first."""
    for step, pair in enumerate(zip(losses, norms, strict=True), start=1):
        limit = TOLERANCE.first if step == 1 else TOLERANCE.later
        for what, difference in zip(("loss", "gradient norm"), pair, strict=True):
            if not difference <= limit:
                yield f"the {what} of step {step} is {difference:.1e} off (tolerance {limit:g})"


# --- what it may mean -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differing:
    """A layout that differs."""

    name: str
    ranks: int
    micro_batch_size: int
    curve: Curve
    reference: Curve
    verdict: Verdict


@dataclass(frozen=True)
class Circumstances:
    """What about model and recipe makes layouts differ. `agreeing_sizes`: micro-batch sizes of layouts that agree;
    `only_bfloat16`: all that is in float32 agrees."""

    dropout: bool = False
    experts: bool = False
    only_bfloat16: bool = False
    agreeing_sizes: frozenset[int] = frozenset()


def explain(differing: Sequence[Differing], about: Circumstances) -> list[str]:
    """What the differences may mean, the likeliest first, each once."""
    return list(dict.fromkeys(line for one in differing for line in _meanings(one, about)))


def _meanings(one: Differing, about: Circumstances) -> Iterator[str]:
    if one.curve.tokens != one.reference.tokens:
        yield "the layouts did not train on the same rows: do the data files change while this runs?"
        return
    loss_is_off, norm_is_off = _off_at_first(one)
    if loss_is_off:
        yield (
            "a loss that is off in the first step: the forward pass depends on which sequences share a micro-batch or "
            "a rank. Layers that mix the samples of a batch do that (batch statistics, a capacity per expert)"
        )
    elif norm_is_off:
        yield _about_the_norm(one)
    else:
        yield (
            "a first step that agrees and later ones that do not: clipping, weight decay or the update depends on how "
            "the weights are cut, or the model is so sensitive that rounding grows (try train.learning_rate lower)"
        )
    if one.micro_batch_size not in about.agreeing_sizes and about.agreeing_sizes:
        yield (
            f"no layout with micro-batches of {one.micro_batch_size} agrees, those of "
            f"{', '.join(map(str, sorted(about.agreeing_sizes)))} do: look at what the model does with padding and "
            "with several sequences at once"
        )
    if about.only_bfloat16:
        yield (
            "float32 agrees and bfloat16 does not: the same is computed, and rounded elsewhere than under fsdp "
            "(gradients that are added up in bfloat16, a cast before a sum)"
        )
    if about.dropout:
        yield "dropout is on: rule it out by setting adapter.dropout, or the dropout keys of config.json, to 0"
    if about.experts:
        yield (
            "the model has experts: a router that is nearly undecided picks another one by rounding (its own "
            "balancing losses are no part of the loss)"
        )


def _off_at_first(one: Differing) -> tuple[bool, bool]:
    loss = _differences(one.curve.losses[:1], one.reference.losses[:1])
    norm = _differences(one.curve.grad_norms[:1], one.reference.grad_norms[:1])
    return max(loss, default=0.0) > TOLERANCE.first, max(norm, default=0.0) > TOLERANCE.first


def _about_the_norm(one: Differing) -> str:
    ratio = one.curve.grad_norms[0] / one.reference.grad_norms[0]
    for factor, what in ((one.ranks, "number of ranks"), (one.micro_batch_size, "micro-batch size")):
        for value in (factor, 1 / factor) if factor > 1 else ():
            if abs(ratio / value - 1) < 1e-3:
                return (
                    f"gradients are {ratio:.4g} times the reference's, which is the {what} ({factor}): a mean was "
                    "taken for a sum, or the other way round"
                )
    return (
        f"losses agree and gradients are {ratio:.6g} times the reference's: a sum over ranks or micro-batches is "
        "incomplete or counts something twice, or the forward pass depends, by less than the loss shows, on which "
        "sequences share a micro-batch"
    )
