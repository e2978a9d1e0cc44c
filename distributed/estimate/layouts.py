"""What of a model one rank keeps under each strategy, and what it needs besides for the block at work: bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...recipes.deepspeed_config import passed_on
from ...recipes.schema import Recipe
from ...recipes.schema_strategy import Deepspeed, Fsdp
from .outline import Outline, Unit
from .setting import BYTES, Setting

FP32 = 4
"""Bytes of masters and of gradients."""

BUCKET_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's own defaults (0.19)."""


@dataclass(frozen=True)
class Layout:
    """On the device: `weights`, and `gradients` when all are there; `state`: the share of the optimizer's state.

    Besides, in a step: `copies` of blocks, from their forward to their backward pass; `always`: gathered for both
    passes; `waiting`: what the last block was gathered from, until the backward pass; `block`: in the backward pass of
    one; `reduce`: when the gradients of a part of the model are reduced, of which `reduced` is the share that is behind
    its backward pass then; `last`: when those of all that lies in no block are, at the end; `holds_gradients`: the
    memory of gradients is there from the first micro-batch.

    `offloaded`: on the host; `state_offloaded`: the share of the optimizer's state there."""

    weights: float
    gradients: float
    state: float
    copies: float = 0.0
    always: float = 0.0
    waiting: float = 0.0
    block: float = 0.0
    reduce: float = 0.0
    reduced: float = 0.0
    last: float = 0.0
    holds_gradients: bool = False
    offloaded: float = 0.0
    state_offloaded: float = 0.0


def layout_of(recipe: Recipe, outline: Outline, setting: Setting) -> Layout:
    """The layout of a strategy that has been chosen."""
    return LAYOUTS[recipe.strategy.type](recipe, outline, setting)


def _plain(outline: Outline, width: int) -> Layout:
    """One rank in float32: the model as it is."""
    trained = FP32 * outline.trained
    return Layout(trained + width * outline.frozen + outline.packed, trained, 1.0)


def _ddp(recipe: Recipe, outline: Outline, setting: Setting) -> Layout:
    width = BYTES[recipe.model.dtype]
    if setting.ranks == 1 and width == FP32:
        return _plain(outline, width)
    return _sharded(outline, setting, width, shards=1, keeps_blocks=True)


def _fsdp(recipe: Recipe, outline: Outline, setting: Setting) -> Layout:
    strategy, width = recipe.strategy, BYTES[recipe.model.dtype]
    assert isinstance(strategy, Fsdp)
    is_away = strategy.offload == "cpu"
    if setting.ranks == 1 and width == FP32 and not is_away:
        return _plain(outline, width)
    shards = setting.ranks_per_node if strategy.shard == "node" else setting.ranks
    layout = _sharded(outline, setting, width, shards=shards, keeps_blocks=not strategy.reshard_after_forward)
    return _offloaded(layout, shards) if is_away else layout


def _sharded(outline: Outline, setting: Setting, width: int, *, shards: int, keeps_blocks: bool) -> Layout:
    """FSDP2. A unit at work is whole, in the compute dtype, and so are its gradients; the next one is fetched beside
    it. It is let go before its gradients are reduced."""
    rest, block = outline.rest, outline.largest
    copies = sum(_whole(unit, width) for unit in outline.blocks) * keeps_blocks
    fetched = _whole(block, width) * (shards > 1 and not keeps_blocks)
    in_gloo = fetched * (setting.device == "cpu")
    gradients = FP32 * outline.trained / shards
    return Layout(
        weights=(FP32 * outline.trained + width * outline.frozen + outline.packed) / shards,
        gradients=gradients,
        state=1 / shards,
        copies=copies,
        always=_whole(rest, width),
        waiting=fetched,
        block=_whole(block, width) * (not keeps_blocks) + fetched + max(in_gloo, width * block.trained / 3),
        reduce=fetched + _reducing(block, setting, width, shards),
        reduced=1 / max(1, len(outline.blocks)),
        last=_reducing(rest, setting, width, shards),
    )


def _whole(unit: Unit, width: int) -> int:
    """A unit, gathered; of weights in 4 bits the one that is unpacked for its layer."""
    return width * (unit.trained + unit.frozen + unit.unpacked) + unit.packed


def _reducing(unit: Unit, setting: Setting, width: int, shards: int) -> float:
    """Gradients as they were made are cast into a buffer; that is reduced (gloo works on a copy, and where there is
    nothing to scatter it is divided), and what comes back is new."""
    copied = FP32 * (setting.device == "cpu" or shards == 1)
    return unit.trained * (FP32 + max(width, copied + FP32 / shards))


def _offloaded(layout: Layout, shards: int) -> Layout:
    """Shards stay on the host; a unit's are copied to the device to be gathered."""
    away = layout.weights + layout.gradients
    return replace(layout, weights=0.0, gradients=0.0, state=0.0, offloaded=away, state_offloaded=1 / shards)


def _deepspeed(recipe: Recipe, outline: Outline, setting: Setting) -> Layout:
    """Weights in the compute dtype lie beside this rank's part of the fp32 ones, in float32 too. Gradients are reduced
    in buckets, through buffers as large."""
    strategy, width, ranks = recipe.strategy, BYTES[recipe.model.dtype], setting.ranks
    assert isinstance(strategy, Deepspeed)
    state_away, weights_away = strategy.offload_optimizer == "cpu", strategy.offload_param == "cpu"
    weights = width * (outline.trained + outline.frozen) / (ranks if strategy.stage == 3 else 1)
    masters = FP32 * outline.trained / ranks
    gradients = FP32 * outline.trained / (1 if _adds_up_whole(strategy, width) else ranks)
    bucket = min(_setting_of(strategy, "reduce_bucket_size", BUCKET_ELEMENTS), outline.trained)
    reduce = _bucket(strategy, setting, width) * bucket
    sent = FP32 * bucket * (strategy.stage == 3)
    away = _on_host(strategy, outline, ranks, width) if state_away else 0.0
    # The largest gradient goes to the host and comes back through a buffer.
    passing = width * _largest_tensor(outline) * (state_away and strategy.stage < 3)
    return Layout(
        weights=weights * (not weights_away) + masters * (not state_away),
        gradients=gradients * (not state_away),
        state=float(not state_away) / ranks,
        copies=width * _live(strategy, outline),
        always=sent + passing,
        reduce=reduce,
        reduced=bucket / max(1, outline.trained),
        last=reduce + sent + passing + _whole(outline.rest, width) * (strategy.stage == 3),
        holds_gradients=True,
        offloaded=weights * weights_away + away,
        state_offloaded=float(state_away) / ranks,
    )


def _on_host(strategy: Deepspeed, outline: Outline, ranks: int, width: int) -> float:
    """fp32 weights, and gradients twice: as they add up and as they are applied. Below stage 3 also updated weights on
    their way to the device, and the largest gradient."""
    part = outline.trained / ranks
    return 3 * FP32 * part + (width * (part + _largest_tensor(outline)) if strategy.stage < 3 else 0.0)


def _largest_tensor(outline: Outline) -> int:
    """Elements of it."""
    return max((math.prod(shape) for shape, _ in outline.state), default=0)


def _adds_up_whole(strategy: Deepspeed, width: int) -> bool:
    """Stage 1 in bfloat16 is a class of its own, which keeps all gradients in fp32 on every rank."""
    return strategy.stage == 1 and width < FP32


def _bucket(strategy: Deepspeed, setting: Setting, width: int) -> float:
    """Bytes per element of a bucket: gradients as they were made, and laid end to end, and in fp32; stage 3 keeps the
    second in fp32, whatever is to be sent. gloo scatters a copy."""
    if strategy.stage == 3:
        return FP32 + FP32 * (setting.device == "cpu")
    return width + FP32 + width * (not _adds_up_whole(strategy, width))


def _live(strategy: Deepspeed, outline: Outline) -> float:
    """Elements that stage 3 holds gathered: it lets go of them only when there are more than
    `stage3_max_live_parameters`, or when they are not needed for as many. Below stage 3 all are there anyway."""
    if strategy.stage < 3:
        return 0.0
    limits = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    limit = min(_setting_of(strategy, name, LIVE_ELEMENTS) for name in limits)
    block = outline.largest
    at_work = 2 * (block.trained + block.frozen) + outline.rest.trained + outline.rest.frozen
    return min(outline.trained + outline.frozen, max(limit, at_work))


def _setting_of(strategy: Deepspeed, name: str, default: int) -> int:
    """A number of DeepSpeed's own configuration."""
    value = passed_on(strategy).get("zero_optimization", {}).get(name, default)
    return int(value)


LAYOUTS: dict[str, Callable[[Recipe, Outline, Setting], Layout]] = {
    "ddp": _ddp,
    "fsdp": _fsdp,
    "deepspeed": _deepspeed,
}
