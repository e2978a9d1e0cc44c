"""How a model's tensors lie in its files, where transformers stores them otherwise than the model holds them: under
other names, or split up, as the experts of a layer, which are one tensor at work and three for each expert in files.

Files are written as transformers itself writes them, so that everything that reads such models reads ours. Each stored
tensor must be a range of a flattened one of the model: then no byte has to move, fragments are cut and reads joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..recipes.errors import UserError
from .checkpoint.exchange import Range
from .checkpoint.fragments import Fragment, FragmentReader, TensorSpec
from .persistent import persistent_buffers

READS_AT_ONCE = 8
"""Of a tensor's parts: the experts of a layer are small, and a store answers each request in some 20 ms."""


class Piece(NamedTuple):
    """A stored tensor that is the elements from `start` on of a flattened tensor of the model."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """Behind its last element."""
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class StoredLayout:
    """`pieces`: of each tensor of the model (its shape is in `shapes`) that is stored otherwise, what it is stored as,
    in order. All others are stored as they are."""

    pieces: Mapping[str, Sequence[Piece]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def names(self, names: Iterable[str]) -> list[str]:
        """What tensors of the model are called in files."""
        return [stored for name in names for stored in self._stored(name)]

    def _stored(self, name: str) -> Sequence[str]:
        return [piece.name for piece in self.pieces[name]] if name in self.pieces else [name]

    def cut(self, fragments: Iterable[Fragment]) -> Iterator[Fragment]:
        """Fragments of the model's tensors as those of stored ones, in an order that is the same on all ranks."""
        for fragment in fragments:
            pieces = self.pieces.get(fragment.spec.name)
            if pieces is None:
                yield fragment
            else:
                yield from (_cut(fragment, piece) for piece in pieces)

    def joined(self, reader: FragmentReader) -> FragmentReader:
        """Stored tensors as the model's."""
        return _Joined(self, reader) if self.pieces else reader


AS_IT_IS = StoredLayout()
"""Every tensor is stored under its name."""


def _cut(fragment: Fragment, piece: Piece) -> Fragment:
    ranges, values, at = [], [], 0
    for start, stop in fragment.ranges:
        first, last = max(start, piece.start), min(stop, piece.stop)
        if first < last:
            ranges.append((first - piece.start, last - piece.start))
            values.append(fragment.values[at + first - start : at + last - start])
        at += stop - start
    held = torch.cat(values) if len(values) > 1 else (values or [fragment.values[:0]])[0]
    spec = TensorSpec(piece.name, piece.shape, fragment.spec.dtype)
    return Fragment(spec, tuple(ranges), held, fragment.replicas)


class _Joined:
    """A `FragmentReader` of the model's tensors."""

    def __init__(self, layout: StoredLayout, reader: FragmentReader) -> None:
        self._layout, self._reader = layout, reader
        there = set(reader.names())
        self._whole = {
            name: pieces for name, pieces in layout.pieces.items() if all(piece.name in there for piece in pieces)
        }
        taken = {piece.name for pieces in self._whole.values() for piece in pieces}
        self._names = [*self._whole, *(name for name in reader.names() if name not in taken)]

    def names(self) -> Sequence[str]:
        """Of tensors all of whose pieces are stored, and of stored ones that are no pieces of those."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype; of a tensor with a piece of another shape than it should have, that piece's. Raises
        KeyError."""
        pieces = self._whole.get(name)
        if pieces is None:
            return self._reader.spec(name)
        specs = [self._reader.spec(piece.name) for piece in pieces]
        other = next((spec for spec, piece in zip(specs, pieces, strict=True) if spec.shape != piece.shape), None)
        return TensorSpec(name, other.shape if other else self._layout.shapes[name], specs[0].dtype)

    def read(self, name: str, ranges: Sequence[Range]) -> Tensor:
        """The elements of these ranges, one after the other."""
        pieces = self._whole.get(name)
        if pieces is None:
            return self._reader.read(name, ranges)
        wanted = [
            (piece.name, (max(start, piece.start) - piece.start, min(stop, piece.stop) - piece.start))
            for start, stop in ranges
            for piece in pieces
            if start < piece.stop and piece.start < stop
        ]
        if not wanted:
            return self._reader.read(pieces[0].name, ())
        with ThreadPoolExecutor(min(READS_AT_ONCE, len(wanted)), thread_name_prefix="pieces") as pool:
            return torch.cat(list(pool.map(lambda one: self._reader.read(one[0], (one[1],)), wanted)))


class _WithoutCopies(TorchFunctionMode):
    """Copies are left out, so that what comes out still is a view of what went in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def layout_of(causal_lm: Any) -> StoredLayout:
    """How transformers stores a model (`revert_weight_conversion`, which `save_pretrained` calls), found by having it
    convert tensors without memory and looking at what of them each result is a view of.

    Raises UserError for a model some of whose stored tensors are no range of one of its own."""
    from transformers.core_model_loading import revert_weight_conversion

    held = {name: torch.empty(tensor.shape, device="meta") for name, tensor in _tensors(causal_lm)}
    with _WithoutCopies():
        stored = revert_weight_conversion(causal_lm, dict(held))
    owner = {id(tensor): name for name, tensor in held.items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in held}
    for name, tensor in stored.items():
        whole = owner.get(id(tensor if tensor._base is None else tensor._base))
        if whole is None or not tensor.is_contiguous():
            raise _refusal(causal_lm, name)
        pieces[whole].append(Piece(name, tuple(tensor.shape), int(tensor.storage_offset())))
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece.start)
        if not _covers(found, held[name].numel()):
            raise _refusal(causal_lm, name)
    other = {name: found for name, found in pieces.items() if [piece.name for piece in found] != [name]}
    return StoredLayout(other, {name: tuple(held[name].shape) for name in other})


def _tensors(causal_lm: Any) -> Iterator[tuple[str, Tensor]]:
    """What files have: parameters, tied ones once, and persistent buffers."""
    yield from causal_lm.named_parameters()
    for name, place in persistent_buffers(causal_lm):
        yield name, place.value


def _covers(pieces: Sequence[Piece], count: int) -> bool:
    """Whether they are all of a tensor, and nothing twice."""
    at = 0
    for piece in pieces:
        if piece.start != at:
            return False
        at = piece.stop
    return at == count


def _refusal(causal_lm: Any, name: str) -> UserError:
    return UserError(
        f"model.path: the stored tensors of model type {causal_lm.config.model_type!r} are merged or permuted by "
        f"transformers when loaded ({name}); training such models is not supported yet."
    )
