"""Fragments: what one rank holds of a tensor, as ranges of the flattened tensor.

One contiguous range covers FSDP2's `Shard(0)` and DeepSpeed's flat partitions; several cover the rest. Writer and
reader know nothing else about strategies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor: `name` as published, `shape`, and `dtype` in safetensors' spelling ("BF16", "F32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Fragment:
    """Ranges of one tensor. `ranges` are (start, stop) element offsets into the flattened tensor, ascending and
    disjoint; `values` holds their elements one after the other, on any device. What is not in the spec's dtype, or not
    on the host, is cast and copied chunk by chunk when it is written. `replicas`: how many ranks hold the very same
    ranges (1: only this one)."""

    spec: TensorSpec
    ranges: tuple[tuple[int, int], ...]
    values: torch.Tensor
    replicas: int = 1


class FragmentReader(Protocol):
    """Stored tensors of one part of a checkpoint, or of a model folder."""

    def names(self) -> Sequence[str]:
        """Names of the stored tensors."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a stored tensor. Raises KeyError."""
        ...

    def read(self, name: str, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The elements of these ranges, one after the other, as a flat host tensor in the stored dtype."""
        ...
