"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), torch's fused one; elementwise, so it needs nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...recipes.schema import Train
from .base import Piece, Shard, ShardGroup
from .state import adamw as state_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw_groups(
    parameters: Mapping[str, nn.Parameter], dimensions: Mapping[str, int], train: Train
) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and other vectors do not. `dimensions` are those of the whole tensors, because a
    strategy may hold them flat."""
    decayed = [p for name, p in parameters.items() if dimensions[name] > 1]
    others = [p for name, p in parameters.items() if dimensions[name] <= 1]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]] or [{"params": [], "weight_decay": 0.0}]


class AdamW:
    """`ShardOptimizer`."""

    def __init__(self, shards: Sequence[Shard], train: Train, group: ShardGroup) -> None:
        self._steps = 0
        self.parts = MOMENTS
        self._shards = {shard.name: shard for shard in shards}
        self._held = {name: shard for name, shard in self._shards.items() if shard.parameter.numel()}
        parameters = {name: shard.parameter for name, shard in self._held.items()}
        groups = adamw_groups(parameters, {name: len(shard.shape) for name, shard in self._held.items()}, train)
        self._optimizer = self._make(groups, train)
        self._create_state()

    def _make(self, groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True)

    def _create_state(self) -> None:
        # Eagerly, so that a checkpoint before the first step looks like every other one.
        for shard in self._held.values():
            self._optimizer.state[shard.parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.parameter.device),
                "exp_avg": torch.zeros_like(shard.parameter),
                "exp_avg_sq": torch.zeros_like(shard.parameter),
            }

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> None:
        self._optimizer.step()
        self._steps += 1

    @property
    def steps(self) -> int:
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = steps
        for state in self._optimizer.state.values():
            self._set_steps(state, steps)

    def _set_steps(self, state: dict[str, Any], steps: int) -> None:
        state["step"].fill_(steps)

    def pieces(self, part: str) -> Mapping[str, Piece]:
        return {
            name: Piece(state_of(shard.shape, shard.is_table)[part], shard.start, shard.stop)
            for name, shard in self._shards.items()
        }

    def read(self, part: str, name: str) -> Tensor:
        values: Tensor = self._state(name)[part]
        return values

    def write(self, part: str, name: str, values: Tensor) -> None:
        target = self._state(name)[part]
        target.copy_(values.view(target.shape))

    def _state(self, name: str) -> Any:
        return self._optimizer.state[self._held[name].parameter]
