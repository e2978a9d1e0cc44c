"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) as Hugging Face's Trainer runs it: the learning rate is the
recipe's, updates are clipped to a root mean square of 1, no first moment.

Of a matrix only the means of its squared gradients over columns and over rows are kept. Ranks hold rows, so the means
over rows, and the root mean squares of whole updates, are summed over the ranks that share a matrix: what is learned
does not depend on the layout. Three small reductions a step serve all tensors together.

Shapes: a shard is [rows held, ..., columns].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...recipes.schema import Train
from .base import Piece, Shard, ShardGroup
from .state import adafactor as state_of

EPSILON = 1e-30
CLIP = 1.0
DECAY = -0.8
"""The paper's epsilon_1, d and the exponent of its decay rate (section 9)."""


class Adafactor:
    """`ShardOptimizer`."""

    def __init__(self, shards: Sequence[Shard], train: Train, group: ShardGroup) -> None:
        self.steps = 0
        self._shards, self._group, self._train = {shard.name: shard for shard in shards}, group, train
        self._rate = train.learning_rate
        self._state = {shard.name: _zeros(shard) for shard in shards}
        kept = [part for state in self._state.values() for part in state]
        self.parts = tuple(dict.fromkeys(kept))

    def set_learning_rate(self, learning_rate: float) -> None:
        self._rate = learning_rate

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        gradients = {name: _gradient(shard) for name, shard in self._shards.items()}
        used = self._sums(
            {name: torch.tensor([shard.parameter.grad is not None]) for name, shard in self._shards.items()}
        )
        gradients = {name: gradient for name, gradient in gradients.items() if used[name]}
        self._follow(gradients)
        updates = self._updates(gradients)
        squares = self._sums({name: update.square().sum()[None] for name, update in updates.items()})
        for name, update in updates.items():
            root_mean_square = (squares[name] / math.prod(self._shards[name].shape)).sqrt()
            self._apply(self._shards[name], update / (root_mean_square / CLIP).clamp_min(1.0))

    def _follow(self, gradients: Mapping[str, Tensor]) -> None:
        """Move the means towards this step's squares."""
        share = math.pow(self.steps, DECAY)
        squares = {name: gradient.square() + EPSILON for name, gradient in gradients.items()}
        columns = self._sums({n: s.sum(0) / self._shards[n].shape[0] for n, s in squares.items() if s.ndim == 2})
        for name, square in squares.items():
            state = self._state[name]
            if square.ndim < 2:
                state["exp_avg_sq"].lerp_(square, share)
                continue
            state["exp_avg_sq_row"].lerp_(square.mean(-1), share)
            # Only a matrix has its rows on several ranks; of more dimensions the first one is shared out.
            state["exp_avg_sq_col"].lerp_(columns[name] if square.ndim == 2 else square.mean(-2), share)

    def _updates(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = {n: self._state[n]["exp_avg_sq_row"] for n, gradient in gradients.items() if gradient.ndim >= 2}
        totals = self._sums({n: row.sum()[None] for n, row in rows.items() if row.ndim == 1})
        updates = {}
        for name, gradient in gradients.items():
            if gradient.ndim < 2:
                updates[name] = gradient * self._state[name]["exp_avg_sq"].rsqrt()
                continue
            row = rows[name]
            mean = totals[name] / self._shards[name].shape[0] if row.ndim == 1 else row.mean(-1, keepdim=True)
            column = self._state[name]["exp_avg_sq_col"].rsqrt().unsqueeze(-2)
            updates[name] = gradient * (row / mean).rsqrt().unsqueeze(-1) * column
        return updates

    def _apply(self, shard: Shard, update: Tensor) -> None:
        if len(shard.shape) > 1:
            shard.parameter.mul_(1.0 - self._rate * self._train.weight_decay)
        shard.parameter.add_(update, alpha=-self._rate)

    def _sums(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the ranks, in one reduction for all."""
        if not values:
            return {}
        device = next(iter(self._shards.values())).parameter.device
        flat = self._group.sum(torch.cat([value.to(device, torch.float32).flatten() for value in values.values()]))
        parts = torch.split(flat, [value.numel() for value in values.values()])
        return {name: part.view(values[name].shape) for name, part in zip(values, parts, strict=True)}

    def pieces(self, part: str) -> Mapping[str, Piece]:
        return {name: _piece(shard, part) for name, shard in self._shards.items() if part in self._state[name]}

    def read(self, part: str, name: str) -> Tensor:
        return self._state[name][part]

    def write(self, part: str, name: str, values: Tensor) -> None:
        target = self._state[name][part]
        target.copy_(values.view(target.shape))


def _gradient(shard: Shard) -> Tensor:
    """In the shard's own shape: empty ones have none."""
    gradient = shard.parameter.grad
    return torch.zeros_like(shard.parameter) if gradient is None else gradient


def _zeros(shard: Shard) -> dict[str, Tensor]:
    held = {part: _held_shape(shard, part) for part in state_of(shard.shape, shard.is_table)}
    return {part: shard.parameter.new_zeros(shape) for part, shape in held.items()}


def _held_shape(shard: Shard, part: str) -> tuple[int, ...]:
    """As the state of a tensor of the shard's own shape, but for a matrix's columns, which every rank has whole."""
    return state_of(tuple(shard.parameter.shape), shard.is_table)[part]


def _piece(shard: Shard, part: str) -> Piece:
    shape = state_of(shard.shape, shard.is_table)[part]
    if part == "exp_avg_sq_col" and len(shard.shape) == 2:
        return Piece(shape, 0, shape[0])
    row, width = math.prod(shard.shape[1:]), math.prod(shape[1:])
    return Piece(shape, shard.start // row * width, shard.stop // row * width) if row else Piece(shape, 0, 0)
