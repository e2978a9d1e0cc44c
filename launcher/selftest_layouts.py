"""The layouts that `ftlaunch selftest` compares, and what each is compared with. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..distributed.data.share import share_of
from ..recipes.schema import Recipe
from ..recipes.schema_strategy import Ddp, Deepspeed, Fsdp, StrategyConfig

Dtype = Literal["bfloat16", "float32"]

_LET_GO = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Otherwise ZeRO-3 keeps small parameters whole, and a small model would not be sharded at all."""

WAYS: Mapping[str, StrategyConfig] = {
    "ddp": Ddp(),
    "fsdp": Fsdp(),
    "hybrid": Fsdp(shard="node"),
    "fsdp-offload": Fsdp(offload="cpu"),
    "zero1": Deepspeed(stage=1),
    "zero2": Deepspeed(stage=2),
    "zero3": Deepspeed(stage=3, deepspeed_config=_LET_GO),
    "zero3-offload": Deepspeed(stage=3, offload_optimizer="cpu", offload_param="cpu", deepspeed_config=_LET_GO),
}
"""Every way to lay a model out, by the name that the table shows."""

OWN = "as the recipe"
"""The recipe's own strategy, where it is none of these."""

EVERY_WORLD = 4
"""Up to this many ranks every number of them is tried; above, 1 to 3 (3 divides nearly nothing) and all."""


@dataclass(frozen=True)
class Layout:
    """One row of the table. `nodes`: logical ones, each with as many ranks."""

    way: str
    strategy: StrategyConfig = field(hash=False)  # it may hold a dict
    ranks: int
    micro_batch_size: int
    dtype: Dtype
    nodes: int = 1

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}" + (f" on {self.nodes} nodes" if self.nodes > 1 else "")
        return f"{self.way}, {ranks}, micro-batch {self.micro_batch_size}, {self.dtype}"


def choose_layouts(recipe: Recipe, ranks: int) -> list[Layout]:
    """Every way on all ranks, and the recipe's own on every number of them, with two micro-batch sizes: in float32,
    where rounding hides nothing. A recipe in bfloat16 has every way once more in that. The fewest ranks come first."""
    own = _way_of(recipe)
    sizes = _micro_batch_sizes(recipe)
    by_world = [_lay(*own, world, sizes[world % 2], "float32") for world in _worlds(ranks)]
    both = [_lay(*own, ranks, size, "float32") for size in sizes]
    dtypes: Sequence[Dtype] = ("float32", "bfloat16") if recipe.model.dtype == "bfloat16" else ("float32",)
    ways = dict([*WAYS.items(), own])
    each = [_lay(name, way, ranks, sizes[0], dtype) for dtype in dtypes for name, way in ways.items()]
    return sorted(
        dict.fromkeys([*by_world, *both, *each]), key=lambda layout: (layout.dtype != "float32", layout.ranks)
    )


def _way_of(recipe: Recipe) -> tuple[str, StrategyConfig]:
    known = (name for name, way in WAYS.items() if way == recipe.strategy)
    return next(known, OWN), recipe.strategy


def _micro_batch_sizes(recipe: Recipe) -> tuple[int, int]:
    """The recipe's, and another."""
    size = recipe.train.micro_batch_size
    return size, 1 if size > 1 else min(2, recipe.train.global_batch_size)


def _worlds(ranks: int) -> list[int]:
    return list(range(1, ranks + 1)) if ranks <= EVERY_WORLD else [1, 2, 3, ranks]


def _lay(way: str, strategy: StrategyConfig, ranks: int, micro_batch_size: int, dtype: Dtype) -> Layout:
    """Sharding by node needs nodes, of as many ranks each."""
    by_node = isinstance(strategy, Fsdp) and strategy.shard == "node"
    if not by_node or ranks == 1:
        return Layout(way, strategy, ranks, micro_batch_size, dtype)
    even = ranks - ranks % 2
    return Layout(way, strategy, even, micro_batch_size, dtype, nodes=2)


def reference_of(layout: Layout, *, dropout: bool) -> Layout:
    """What a layout must agree with. In float32 one rank with one sequence at a time, as a plain loop would have it; of
    the same micro-batch size where dropout is on, which is drawn once per micro-batch. In bfloat16, where every other
    shape of a matrix rounds otherwise, fsdp in just the same shapes."""
    plain = replace(layout, way="fsdp", strategy=Fsdp(), nodes=1)
    if layout.dtype == "bfloat16":
        return plain
    return replace(plain, ranks=1, micro_batch_size=layout.micro_batch_size if dropout else 1)


def with_references(layouts: Sequence[Layout], *, dropout: bool) -> list[Layout]:
    """The layouts, each after what it is compared with."""
    ordered: dict[Layout, None] = {}
    for layout in layouts:
        ordered[reference_of(layout, dropout=dropout)] = None
        ordered[layout] = None
    return sorted(ordered, key=lambda layout: (layout.dtype != "float32", layout.ranks))


def same_micro_batches(layout: Layout, other: Layout, streams: int, global_batch_size: int) -> bool:
    """Whether two layouts put the same sequences together, so that they drop the same values."""
    return _micro_batches(layout, streams, global_batch_size) == _micro_batches(other, streams, global_batch_size)


def _micro_batches(layout: Layout, streams: int, global_batch_size: int) -> set[tuple[int, ...]]:
    """The numbers of the bins in every micro-batch of a step, -1 for empty ones."""
    return {
        group
        for rank in range(layout.ranks)
        for group in _of_rank(rank, layout, streams, global_batch_size)
        if any(number >= 0 for number in group)
    }


def _of_rank(rank: int, layout: Layout, streams: int, global_batch_size: int) -> Iterator[tuple[int, ...]]:
    size = layout.micro_batch_size
    share = share_of(rank, layout.ranks, streams, global_batch_size, size)
    bins = [
        number + place * streams
        for number in share.streams
        for place in range(share.bins_per_stream)
        if place % share.sharers == share.place
    ]
    bins += [-1] * (share.micro_batches * size - len(bins))
    return (tuple(bins[start : start + size]) for start in range(0, len(bins), size))
