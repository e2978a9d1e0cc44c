"""Which tensors decay: the parameter groups that every strategy hands to its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...recipes.schema import Train


def adamw_groups(
    parameters: Mapping[str, nn.Parameter], dimensions: Mapping[str, int], train: Train
) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and other vectors do not. `dimensions` are those of the whole tensors, because a
    strategy may hold them flat."""
    decayed = [p for name, p in parameters.items() if dimensions[name] > 1]
    others = [p for name, p in parameters.items() if dimensions[name] <= 1]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]] or [{"params": [], "weight_decay": 0.0}]
