"""What the recipe's strategy is or will be, and how much memory a rank takes under it. Pure, but for one look whether
DeepSpeed is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..distributed.estimate.choose import Choice, choose, described, possible, usable_bytes, with_strategy
from ..distributed.estimate.memory import Memory, estimate
from ..distributed.estimate.outline import Outline
from ..distributed.estimate.remedies import advice
from ..distributed.estimate.setting import Room, Setting
from ..recipes.schema import Recipe
from ..recipes.schema_cluster import LocalCluster
from ..recipes.schema_strategy import Auto
from . import units
from .hardware import Machine
from .plan_model import ModelPlan
from .plan_world import WorldPlan
from .unknown import Unknown


@dataclass(frozen=True)
class StrategyPlan:
    """`chosen`: the strategy's keys; `why`: how `auto` came to it, empty for a strategy that the recipe names; `memory`
    of a rank under it, and the sum of its parts on the device (`rank_bytes`); `warning`: what does not fit, and what
    helps."""

    chosen: Mapping[str, Any]
    why: str
    memory: Memory
    rank_bytes: int
    warning: str = ""


def plan_strategy(recipe: Recipe, model: ModelPlan, world: WorldPlan, machine: Machine) -> StrategyPlan | Unknown:
    """As the ranks will decide it, by what is known here."""
    if model.outline is None:
        return Unknown(f"config.json of {model.model_type} does not say how wide its layers are, and how many")
    setting, room = Setting(world.ranks, world.nodes, world.device), room_here(recipe, world, machine)
    if isinstance(recipe.strategy, Auto):
        if usable_bytes(recipe, room) is None:
            return Unknown(_by_need(recipe, model.outline, setting, room))
        return _chosen(recipe, model.outline, choose(recipe, model.outline, setting, room), room)
    memory = estimate(recipe, model.outline, setting)
    short = room.device_bytes is not None and memory.total > room.device_bytes
    warning = advice(recipe, model.outline, setting, room) if short else ""
    return StrategyPlan(recipe.strategy.model_dump(mode="json"), "", memory, memory.total, warning)


def room_here(recipe: Recipe, world: WorldPlan, machine: Machine) -> Room:
    """What a rank will find: known where this machine is the node."""
    has_deepspeed = find_spec("deepspeed") is not None
    if not isinstance(recipe.cluster, LocalCluster) or not machine.memory_bytes:
        return Room(None, None, has_deepspeed)
    share = machine.memory_bytes // world.ranks  # logical nodes share the machine
    device = (machine.gpu_memory_bytes or None) if world.device == "cuda" else share
    return Room(device, share, has_deepspeed)


def _chosen(recipe: Recipe, outline: Outline, choice: Choice, room: Room) -> StrategyPlan:
    warning = "" if choice.fits else advice(recipe, outline, choice.setting, room)
    return StrategyPlan(
        choice.strategy.model_dump(mode="json"), str(choice), choice.memory, choice.memory.total, warning
    )


def _by_need(recipe: Recipe, outline: Outline, setting: Setting, room: Room) -> str:
    """Why nothing is chosen yet, and what would be for how much memory."""
    needs = "; ".join(
        f"{described(candidate.strategy)} takes about "
        f"{units.size(estimate(with_strategy(recipe, candidate.strategy), outline, setting).total)} a rank"
        for candidate in possible(recipe, setting, room)
    )
    return f"auto chooses by the memory of the run's devices, which strategy.memory_gb can say here; {needs}"
