"""The seam between a format of checkpoints and what is made of them.

A format's `find(folder)` says None to a folder that holds nothing of its kind, raises UserError for one that is damaged
or cannot be imported, and otherwise gives a `Foreign` under the names that its program uses. Nothing is read until
then but headers; what is read is mapped or comes tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..checkpoint.exchange import Range
from ..checkpoint.fragments import FragmentReader, TensorSpec
from ..checkpoint.layout import DTYPE_OF_TORCH, num_elements

MOMENTS = ("exp_avg", "exp_avg_sq")


class Moments(NamedTuple):
    """AdamW's state: each moment's tensors by the names of the weights, and the number of updates."""

    readers: Mapping[str, FragmentReader]
    step: float


@dataclass(frozen=True)
class Foreign:
    """An opened checkpoint. `what`: in words; `dtype`: in which the model computed (torch's name; None: as stored);
    `step`: as its program counted. `moments` is None where `why_no_moments` says why. `left_behind`: what else it
    holds, in words."""

    what: str
    weights: FragmentReader
    dtype: str | None
    step: int
    moments: Moments | None
    why_no_moments: str = ""
    left_behind: tuple[str, ...] = ()


class Piece(NamedTuple):
    """Elements from `start` on of a flattened tensor."""

    start: int
    values: torch.Tensor


@dataclass(frozen=True)
class MappedTensors:
    """A `FragmentReader` of tensors that are mapped from files, each in one or several pieces, ascending; together they
    cover it. Pieces may have any shape and strides."""

    specs: Mapping[str, TensorSpec]
    pieces: Mapping[str, Sequence[Piece]] = field(repr=False)

    @classmethod
    def whole(cls, tensors: Mapping[str, torch.Tensor]) -> MappedTensors:
        """Tensors in one piece."""
        specs = {name: TensorSpec(name, tuple(t.shape), stored_dtype(t.dtype)) for name, t in tensors.items()}
        return cls(specs, {name: [Piece(0, tensor)] for name, tensor in tensors.items()})

    def names(self) -> Sequence[str]:
        """In their order in the files."""
        return list(self.specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype. Raises KeyError."""
        return self.specs[name]

    def read(self, name: str, ranges: Sequence[Range]) -> torch.Tensor:
        """A copy of the elements of these ranges, one after the other."""
        found = [part for one in ranges for part in self._parts(name, *one)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch_dtype(self.specs[name]))

    def _parts(self, name: str, start: int, stop: int) -> Sequence[torch.Tensor]:
        parts = []
        for begin, values in self.pieces[name]:
            low, high = max(start, begin), min(stop, begin + values.numel())
            if low < high:
                parts.append(values.detach().reshape(-1)[low - begin : high - begin])
        return parts


def stored_dtype(dtype: torch.dtype) -> str:
    """safetensors' name."""
    return DTYPE_OF_TORCH[str(dtype).removeprefix("torch.")]


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """The inverse, of a tensor."""
    names = {stored: name for name, stored in DTYPE_OF_TORCH.items()}
    dtype: torch.dtype = getattr(torch, names[spec.dtype])
    return dtype


@dataclass(frozen=True)
class Renamed:
    """A `FragmentReader` of some tensors of another under other names. `names_there`: ours -> theirs."""

    reader: FragmentReader
    names_there: Mapping[str, str]

    def names(self) -> Sequence[str]:
        """Ours."""
        return list(self.names_there)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype, under our name. Raises KeyError."""
        there = self.reader.spec(self.names_there[name])
        return TensorSpec(name, there.shape, there.dtype)

    def read(self, name: str, ranges: Sequence[Range]) -> torch.Tensor:
        """The elements of these ranges, one after the other."""
        return self.reader.read(self.names_there[name], ranges)

    def without(self, dropped: Sequence[str]) -> Renamed:
        """All but these."""
        return Renamed(self.reader, {ours: theirs for ours, theirs in self.names_there.items() if ours not in dropped})


def missing_elements(tensors: MappedTensors) -> list[str]:
    """Names of tensors that their pieces do not cover."""
    return [
        name
        for name, spec in tensors.specs.items()
        if sum(values.numel() for _, values in tensors.pieces[name]) != num_elements(spec)
    ]
