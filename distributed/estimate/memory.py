"""An estimate of what one rank takes while it trains: by part, at the moment when it takes most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...recipes.schema import Recipe
from ..optimizers.state import BYTES as BYTES_OF_STATE
from ..optimizers.state import STATE
from .activations import Activations, activations
from .layouts import FP32, Layout, layout_of
from .outline import Outline
from .setting import BYTES, Setting


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device at its fullest `moment`, and on the host what is `offloaded` and copied for `staging`
    (saves beside the training). `gathered`: what is fetched from other ranks or on its way to them."""

    moment: str
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    offloaded: int = 0
    staging: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.parts.values())

    @property
    def host(self) -> int:
        """Besides, on the host."""
        return self.offloaded + self.staging

    @property
    def parts(self) -> dict[str, int]:
        """On the device, by name."""
        names = ("weights", "gradients", "optimizer", "gathered", "activations", "loss")
        return {name: getattr(self, name) for name in names}


def estimate(recipe: Recipe, outline: Outline, setting: Setting) -> Memory:
    """Of a recipe whose strategy has been chosen. The peaks of a step are looked at: the loss (all activations are
    there), the backward pass of the last block, the end of the backward pass (all gradients are there), the update."""
    layout, acts = layout_of(recipe, outline, setting), activations(recipe, outline, setting)
    state = state_bytes(recipe, outline)
    moments = _moments(recipe, outline, setting, layout, acts)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {
        "weights": layout.weights,
        "optimizer": layout.state * state,
        **{name: moments[moment].get(name, 0.0) for name in ("gradients", "gathered", "activations", "loss")},
    }
    return Memory(
        moment=moment,
        **{name: math.ceil(value) for name, value in parts.items()},
        offloaded=math.ceil(layout.offloaded + layout.state_offloaded * state),
        staging=math.ceil(_staging(recipe, outline, setting)),
    )


def _moments(
    recipe: Recipe, outline: Outline, setting: Setting, layout: Layout, acts: Activations
) -> dict[str, dict[str, float]]:
    """What comes to weights and optimizer."""
    width = BYTES[recipe.model.dtype]
    adds_up = accumulates(recipe, setting)
    gradients = layout.gradients * (adds_up or layout.holds_gradients)
    # Made first of all in the backward pass, and sent last.
    head = width * outline.head * outline.is_head_trained * (layout.always > 0)
    gathered = layout.always + layout.copies
    return {
        "the loss": {
            "gradients": gradients,
            "gathered": gathered + layout.waiting,
            "activations": acts.saved,
            "loss": acts.loss,
        },
        "the backward pass of a block": {
            "gradients": gradients,
            "gathered": gathered + head + layout.block,
            "activations": acts.saved + acts.work,
        },
        "the reduction of gradients": {
            "gradients": gradients,
            "gathered": layout.always + layout.copies * (1 - layout.reduced) + head + layout.reduce,
            "activations": acts.saved * (1 - layout.reduced),
        },
        "the end of the backward pass": {
            "gradients": layout.gradients,
            "gathered": layout.last,
        },
        "the update": {
            "gradients": layout.gradients,
            "gathered": _update(recipe, outline, layout),
        },
    }


def accumulates(recipe: Recipe, setting: Setting) -> bool:
    """Whether a step has several micro-batches on a rank."""
    return recipe.train.global_batch_size > setting.ranks * recipe.train.micro_batch_size


def _update(recipe: Recipe, outline: Outline, layout: Layout) -> float:
    """What an optimizer works with besides: adafactor squares, and makes, all updates at once; muon one matrix after
    the other, whole, in 16 bits (three of them) and in fp32."""
    matrix = max((math.prod(shape) for shape, table in outline.state if len(shape) == 2 and not table), default=0)
    return {"adafactor": 2 * layout.gradients, "muon": 12.0 * matrix}.get(recipe.train.optimizer, 0.0)


def state_bytes(recipe: Recipe, outline: Outline) -> float:
    """The optimizer's state of the whole model."""
    return BYTES_OF_STATE[recipe.train.optimizer] * _state_elements(recipe, outline)


def _state_elements(recipe: Recipe, outline: Outline) -> int:
    kept = STATE[recipe.train.optimizer]
    return sum(math.prod(part) for shape, table in outline.state for part in kept(shape, table).values())


def _staging(recipe: Recipe, outline: Outline, setting: Setting) -> float:
    """Copies of what a checkpoint holds, of which each rank makes its share: published weights, masters, state."""
    if recipe.checkpoint.mode == "sync":
        return 0.0
    width = BYTES[recipe.model.dtype]
    masters = 0 if width == FP32 else FP32
    return ((width + masters) * outline.trained + FP32 * _state_elements(recipe, outline)) / setting.ranks
