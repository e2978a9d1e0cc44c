"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for hidden matrices, AdamW for everything else.

The momentum of a matrix is made orthogonal by five Newton-Schulz iterations before it is applied, scaled so that the
recipe's learning rate and decay are those of AdamW (Liu et al. 2025, arXiv:2502.16982, equation 4); momentum 0.95,
Nesterov's. It is `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` on shards: the iterations need whole matrices, so
of so many matrices as there are ranks each rank assembles one, and sends the rows back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...recipes.schema import Train
from .adamw import AdamW
from .base import Piece, Shard, ShardGroup
from .state import is_hidden_matrix

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
PART = "momentum_buffer"


class Muon:
    """`ShardOptimizer`."""

    def __init__(self, shards: Sequence[Shard], train: Train, group: ShardGroup) -> None:
        matrices = [shard for shard in shards if is_hidden_matrix(shard.shape, shard.is_table)]
        others = [shard for shard in shards if not is_hidden_matrix(shard.shape, shard.is_table)]
        self._group, self._train, self._rate = group, train, train.learning_rate
        self._matrices = {shard.name: shard for shard in matrices}
        self._momentum = {shard.name: torch.zeros_like(shard.parameter) for shard in matrices}
        self._lengths = _lengths(matrices, group)
        self._others = AdamW(others, train, group)
        self._steps = 0
        self.parts = ((PART,) if matrices else ()) + (tuple(self._others.parts) if others else ())

    @property
    def steps(self) -> int:
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = self._others.steps = steps

    def set_learning_rate(self, learning_rate: float) -> None:
        self._rate = learning_rate
        self._others.set_learning_rate(learning_rate)

    @torch.no_grad()
    def step(self) -> None:
        self._others.step()
        self._steps += 1
        shards = list(self._matrices.values())
        for first in range(0, len(shards), self._group.size):
            batch = shards[first : first + self._group.size]
            rows = self._orthogonal(batch, [self._followed(shard) for shard in batch])
            for shard, update in zip(batch, rows, strict=True):
                self._apply(shard, update)

    def _followed(self, shard: Shard) -> Tensor:
        """This rank's rows of Nesterov's momentum."""
        buffer, gradient = self._momentum[shard.name], shard.parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(buffer)
        buffer.lerp_(gradient, 1.0 - MOMENTUM)
        return gradient.lerp(buffer, MOMENTUM)

    def _orthogonal(self, batch: Sequence[Shard], updates: Sequence[Tensor]) -> Iterator[Tensor]:
        """This rank's rows of each orthogonal matrix; the i-th is made on rank i."""
        size, rank = self._group.size, self._group.rank
        empty = updates[0].new_empty(0)
        lengths = [self._lengths[shard.name] for shard in batch]
        mine = lengths[rank] if rank < len(batch) else [0] * size
        held = self._group.exchange([*updates, *[empty] * (size - len(batch))], mine)
        made = [empty] * size
        if rank < len(batch):
            whole = orthogonalised(torch.cat(held).view(batch[rank].shape)).float()
            made = list(torch.split(whole.flatten(), mine))
        back = [of_matrix[rank] for of_matrix in lengths] + [0] * (size - len(batch))
        received = self._group.exchange(made, back)
        return (part.view(update.shape) for part, update in zip(received, updates, strict=False))

    def _apply(self, shard: Shard, update: Tensor) -> None:
        shard.parameter.mul_(1.0 - self._rate * self._train.weight_decay)
        shard.parameter.add_(update, alpha=-self._rate * 0.2 * math.sqrt(max(shard.shape)))

    def pieces(self, part: str) -> Mapping[str, Piece]:
        if part != PART:
            return self._others.pieces(part)
        return {name: Piece(shard.shape, shard.start, shard.stop) for name, shard in self._matrices.items()}

    def read(self, part: str, name: str) -> Tensor:
        return self._momentum[name] if part == PART else self._others.read(part, name)

    def write(self, part: str, name: str, values: Tensor) -> None:
        if part != PART:
            self._others.write(part, name, values)
        else:
            self._momentum[name].copy_(values.view(self._momentum[name].shape))


def _lengths(matrices: Sequence[Shard], group: ShardGroup) -> dict[str, list[int]]:
    """How many elements of each matrix every rank holds."""
    everyone = group.everyones([shard.stop - shard.start for shard in matrices])
    return {shard.name: [of_rank[i] for of_rank in everyone] for i, shard in enumerate(matrices)}  # type: ignore[index]


def orthogonalised(matrix: Tensor) -> Tensor:
    """U V^T of a matrix [A, B], about: singular values between 0.5 and 1.5. In bf16, as its authors have it."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    if x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
