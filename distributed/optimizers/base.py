"""The seam between a strategy, which holds shards, and an optimizer, which updates them.

A strategy gives each rank's shards of all trainable tensors, empty ones too, in the same order on every rank. The
optimizer may talk to the ranks that share them; all of them call `step` alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .state import Shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Shard:
    """Rows of one trainable tensor of shape `shape`: elements [start, stop) of the flattened tensor. `parameter` holds
    them, in fp32, with the whole tensor's dimensions but the first; its gradient is None where there was none.
    `is_table`: whether it belongs to embeddings or to the head."""

    name: str
    parameter: nn.Parameter
    shape: Shape
    start: int
    stop: int
    is_table: bool = False


class Piece(NamedTuple):
    """What this rank holds of a part of the state of one tensor: elements [start, stop) of shape `shape`."""

    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True)
class ShardGroup:
    """The ranks that share the tensors among them, in the order of their shards."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def exchange(self, values: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """The i-th goes to rank i; what came from each rank, flat, `lengths` long."""
        if self.size == 1:
            return [values[0].flatten()]
        sent = torch.cat([value.flatten() for value in values])
        received = sent.new_empty(sum(lengths))
        dist.all_to_all_single(received, sent, list(lengths), [value.numel() for value in values], group=self.group)
        return list(torch.split(received, list(lengths)))

    def everyones(self, value: object) -> list[object]:
        """A small thing of every rank's, by rank."""
        values: list[object] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values


class ShardOptimizer(Protocol):
    """What a strategy asks of an optimizer."""

    steps: int
    """Updates so far."""

    parts: Sequence[str]
    """Names of the state that a checkpoint holds. Each part is one tensor per entry of `pieces`."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the coming step."""
        ...

    def step(self) -> None:
        """Update every shard by its gradient; collective over the `ShardGroup`."""
        ...

    def pieces(self, part: str) -> Mapping[str, Piece]:
        """By tensor, the same names on every rank."""
        ...

    def read(self, part: str, name: str) -> Tensor:
        """A piece's values in fp32."""
        ...

    def write(self, part: str, name: str, values: Tensor) -> None:
        """The inverse of `read`, from host memory."""
        ...
