"""How far a run is, and the learning rate that belongs there. Pure.

With packing nobody knows how many steps an epoch has before its last row is tokenised, so schedules run on progress:
the share of the work that is done, measured in what the run's length is given in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..recipes.schema import Train


@dataclass(frozen=True)
class Extent:
    """What has been done: optimizer steps, tokens read by the model, bytes of the counted source served."""

    steps: int = 0
    tokens: int = 0
    served_bytes: int = 0

    def after(self, *, tokens: int, served_bytes: int) -> Extent:
        """The extent after one more step."""
        return Extent(self.steps + 1, self.tokens + tokens, self.served_bytes + served_bytes)


def progress(train: Train, extent: Extent, total_bytes: int) -> float:
    """Share of the run that is done, 0 to 1."""
    if train.max_steps is not None:
        return min(1.0, extent.steps / train.max_steps)
    if train.max_tokens is not None:
        return min(1.0, extent.tokens / train.max_tokens)
    return min(1.0, extent.served_bytes / total_bytes) if total_bytes else 0.0


def is_bounded_by_data(train: Train) -> bool:
    """Whether the run ends when its data does, rather than at a number of steps or tokens."""
    return train.max_steps is None and train.max_tokens is None


def learning_rate(train: Train, before: Extent, after: Extent, total_bytes: int) -> float:
    """The rate of the step that leads from `before` to `after`.

    Both warm-up and decay are taken in the middle of the step: at its beginning the first step of a warm-up would
    have rate 0 and learn nothing, at its end the last one of a decay would.
    """
    middle = (progress(train, before, total_bytes) + progress(train, after, total_bytes)) / 2
    if train.warmup_steps is not None:
        warmup = min(1.0, (before.steps + 0.5) / train.warmup_steps) if train.warmup_steps else 1.0
        return train.learning_rate * (warmup if warmup < 1.0 else SHAPES[train.lr_scheduler](train, middle))
    if middle < train.warmup_ratio:
        return train.learning_rate * middle / train.warmup_ratio
    return train.learning_rate * SHAPES[train.lr_scheduler](train, _after_warmup(train, middle))


def _after_warmup(train: Train, middle: float) -> float:
    """Progress counted from the end of a warm-up given as a ratio (wsd's decay is a share of the whole run)."""
    if train.lr_scheduler == "wsd" or train.warmup_ratio >= 1.0:
        return middle
    return (middle - train.warmup_ratio) / (1.0 - train.warmup_ratio)


def _constant(_train: Train, _p: float) -> float:
    return 1.0


def _linear(train: Train, p: float) -> float:
    return train.min_lr_ratio + (1.0 - train.min_lr_ratio) * (1.0 - p)


def _cosine(train: Train, p: float) -> float:
    return train.min_lr_ratio + (1.0 - train.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * p))


def _wsd(train: Train, p: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395)."""
    start = 1.0 - train.decay_ratio
    return 1.0 if p <= start else _linear(train, (p - start) / train.decay_ratio)


SHAPES: dict[str, Callable[[Train, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
}
