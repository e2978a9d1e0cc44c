"""Where an adapter starts when that is more than a draw: the length of each weight row, or a part of the weights.

Shapes: weight W [O, I] (outputs, inputs), rank R, A0 [R, I], B0 [O, R], scale s. An adapter that starts within the
weights has s B0 A0 ~ W in its principal part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..recipes.schema import Lora, Recipe
from .adapter import NAME, lora_layers
from .checkpoint.exchange import Range
from .checkpoint.fragments import FragmentReader, TensorSpec
from .group import Group
from .initialise import drawn_adapter, drawn_from, keyed_seed
from .model import BuiltModel, base_name

if TYPE_CHECKING:
    from .strategies.base import Engine

Pair = tuple[Tensor, Tensor]
"""(A0, B0)."""


def start_adapter(engine: Engine, built: BuiltModel, recipe: Recipe, base: FragmentReader, group: Group) -> None:
    """Give a fresh adapter the values that it starts from, the same at every world size; collective.

    `base` holds the weights that the run starts from. A layer is decomposed by one rank, on its device, and the result
    sent to all: ranks on other processors would round otherwise, and each would pay for it.
    """
    adapter = recipe.adapter
    if adapter is None or (adapter.init == "kaiming" and not adapter.use_dora):
        return  # `initialise.fill_adapter` has drawn it
    layers = _layers(built)
    pairs: dict[str, Pair] = {}
    if adapter.starts_within:
        pairs = _decompose_all(layers, adapter, recipe.train.seed, base, group)
    start = AdapterStart(built, recipe, layers, base, pairs)
    for part in ("model", "master"):
        if part in engine.parts:
            group.alike(partial(engine.load, part, start), "starting the adapter")


@dataclass(frozen=True)
class Layer:
    """One adapted layer: the stored name of its base weight, whether that lies transposed [I, O], and the scale s."""

    name: str
    weight: str
    transposed: bool
    scale: float


def _layers(built: BuiltModel) -> list[Layer]:
    return [
        Layer(name, base_name(f"{name}.base_layer.weight"), bool(getattr(layer, "fan_in_fan_out", False)), scale)
        for name, layer in lora_layers(built.loss_model)
        for scale in [layer.scaling[NAME]]
    ]


def _whole(base: FragmentReader, layer: Layer) -> Tensor:
    """W [O, I] in fp32, on the host."""
    shape = base.spec(layer.weight).shape
    weight = base.read(layer.weight, ((0, shape[0] * shape[1]),)).view(shape).float()
    return weight.T if layer.transposed else weight


def _decompose_all(
    layers: Sequence[Layer], adapter: Lora, seed: int, base: FragmentReader, group: Group
) -> dict[str, Pair]:
    """A0 and B0 of every layer: in rounds in which each rank takes one layer, so that it holds one weight at a time."""
    decompose, world = DECOMPOSITIONS[adapter.init], group.world
    pairs: dict[str, Pair] = {}

    def one(layer: Layer) -> Pair:
        with drawn_from(keyed_seed(seed, layer.weight)), torch.no_grad():
            a, b = decompose(_whole(base, layer).to(world.device), adapter.rank, layer.scale)
        return a.cpu().contiguous(), b.cpu().contiguous()

    for first in range(0, len(layers), world.size):
        batch = layers[first : first + world.size]
        mine = batch[world.rank : world.rank + 1]
        made = group.alike(lambda mine=mine: [one(layer) for layer in mine], "decomposing weights")  # type: ignore[misc]
        for layer, of_rank in zip(batch, group.peers.gather(made), strict=False):
            pairs[layer.name] = of_rank[0]
    return pairs


def pissa(weight: Tensor, rank: int, scale: float) -> Pair:
    """Principal singular vectors (Meng et al. 2024, equations 2 to 4), shared out evenly; peft's scale."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return _shared_out(left, values, right, rank, scale)


def fast_pissa(iterations: int, weight: Tensor, rank: int, scale: float) -> Pair:
    """The same, found by subspace iteration (Halko et al. 2011, algorithms 4.4 and 5.1, with their 10 vectors more)."""
    left, values, right = torch.svd_lowrank(weight, min(rank + 10, *weight.shape), niter=iterations)
    return _shared_out(left, values, right.T, rank, scale)


def _shared_out(left: Tensor, values: Tensor, right: Tensor, rank: int, scale: float) -> Pair:
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def olora(weight: Tensor, rank: int, scale: float) -> Pair:
    """An orthonormal basis Q of the outputs and R (Büyükakyüz 2024, algorithm 1; peft's, which does not undo s)."""
    orthonormal, upper = torch.linalg.qr(weight)
    return upper[:rank], orthonormal[:, :rank]


DECOMPOSITIONS: Mapping[str, Callable[[Tensor, int, float], Pair]] = {
    "pissa": pissa,
    "pissa_niter_4": partial(fast_pissa, 4),
    "pissa_niter_16": partial(fast_pissa, 16),
    "olora": olora,
}


class AdapterStart:
    """A `FragmentReader` of an adapter that was never trained, by its published names; tensors are made when read."""

    def __init__(
        self,
        built: BuiltModel,
        recipe: Recipe,
        layers: Sequence[Layer],
        base: FragmentReader,
        pairs: Mapping[str, Pair],
    ) -> None:
        self._built, self._base, self._pairs = built, base, pairs
        self._seed, self._init = recipe.train.seed, recipe.adapter.init if recipe.adapter else "kaiming"
        self._layers = {layer.name: layer for layer in layers}
        self._inside = {published: name for name, published in built.published.items()}

    def names(self) -> Sequence[str]:
        """Names of the adapter's tensors."""
        return list(self._inside)

    def spec(self, name: str) -> TensorSpec:
        """Shape of a tensor. Raises KeyError."""
        return TensorSpec(name, self._built.shapes[self._inside[name]], "F32")

    def read(self, name: str, ranges: Sequence[Range]) -> Tensor:
        """The elements of these ranges, one after the other."""
        inside = self._inside[name]
        source = self._built.copied_from(inside)
        if source is not None:
            return self._base.read(source, ranges)
        layer, _, kind = inside.partition(".lora_")
        if kind.startswith("magnitude") and not self._layers[layer].transposed:
            return torch.cat([self._lengths(self._layers[layer], rows) for rows in ranges])
        flat = self._tensor(inside).flatten()
        return torch.cat([flat[start:stop] for start, stop in ranges])

    def _lengths(self, layer: Layer, rows: Range) -> Tensor:
        """Lengths of some of W's rows: no more of it is read."""
        columns = self._base.spec(layer.weight).shape[1]
        weight = self._base.read(layer.weight, ((rows[0] * columns, rows[1] * columns),))
        return _row_lengths(weight.view(-1, columns).float())

    def _tensor(self, inside: str) -> Tensor:
        """A whole tensor, by its name in the module."""
        layer, _, kind = inside.partition(".lora_")
        if kind.startswith("magnitude"):
            return _row_lengths(_whole(self._base, self._layers[layer]))
        if layer in self._pairs:
            a, b = self._pairs[layer]
            return torch.cat([a, a]) if kind.startswith("A.") else torch.cat([b, -b], dim=1)
        return drawn_adapter(inside, self._built.shapes[inside], self._seed, self._init)


def _row_lengths(weight: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return lengths
