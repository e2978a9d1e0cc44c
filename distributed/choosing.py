"""The strategy of a run as its ranks decide it, and what to say when its memory does not suffice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from ..recipes.schema import Recipe
from ..recipes.schema_strategy import Auto, Fsdp
from .attempt import Attempt
from .data.memory import free_bytes
from .estimate.choose import choose, with_strategy
from .estimate.outline import Outline
from .estimate.remedies import advice
from .estimate.setting import Room, Setting
from .group import Group
from .metrics import Recorder
from .model import BuiltModel
from .outline import outline_of
from .world import World

UNESTIMATED = (
    "Lower train.micro_batch_size or data.sequence_length, set train.activation_checkpointing, train an adapter, or "
    "use more GPUs."
)


@dataclass(frozen=True)
class Chosen:
    """The recipe with a strategy that is no longer `auto`, and the `room` that this rank found. `note`: what to tell
    the user, if there is something; `fits`: by the estimate."""

    recipe: Recipe
    outline: Outline | None
    setting: Setting
    room: Room
    note: str = ""
    fits: bool = True

    def advise(self) -> str:
        """What takes the memory of a rank, and what to change."""
        if self.outline is None:
            return UNESTIMATED
        return advice(self.recipe, self.outline, self.setting, self.room)


def choose_strategy(
    recipe: Recipe,
    built: BuiltModel,
    config: Mapping[str, Any],
    attempt: Attempt,
    group: Group,
    recorder: Recorder | None,
) -> Chosen:
    """What `auto` means here, the same on every rank; another strategy as it is. It is said, and written down for later
    attempts. `config`: the model's config.json. Collective."""
    world, outline = group.world, outline_of(built, config)
    setting = Setting(world.size, world.num_nodes, torch.device(world.device).type)
    room = find_room(world)
    chosen = Chosen(recipe, outline, setting, room)
    if isinstance(recipe.strategy, Auto):
        chosen = _decide(chosen, poorest(group.peers.gather(room)), attempt.strategy)
    if recorder:
        if chosen.note:
            recorder.message(chosen.note, level="info" if chosen.fits else "warning")
        attempt.run.write_environment(strategy=chosen.recipe.strategy.model_dump(mode="json"))
    return chosen


def _decide(asked: Chosen, room: Room, before: Mapping[str, Any] | None) -> Chosen:
    """The strategy that fits `room`; `before`: that of the attempt before."""
    if asked.outline is None:
        note = "strategy auto: fsdp: config.json does not say how large this model's layers are"
        return replace(asked, recipe=with_strategy(asked.recipe, Fsdp()), note=note)
    choice = choose(asked.recipe, asked.outline, asked.setting, room)
    note, strategy = str(choice), choice.strategy.model_dump(mode="json")
    if before is not None and before != strategy:
        note += f"; the attempt before ran under {before['type']}, and checkpoints are the same"
    return replace(asked, recipe=with_strategy(asked.recipe, choice.strategy), note=note, fits=choice.fits)


def find_room(world: World) -> Room:
    """What this rank finds, before it has taken anything."""
    host = free_bytes() // world.local_size
    is_cuda = world.device.startswith("cuda")
    device = torch.cuda.mem_get_info(world.device)[0] if is_cuda else host
    return Room(device, host, find_spec("deepspeed") is not None)


def poorest(rooms: list[Room]) -> Room:
    """The room of the rank that has least, so that all ranks decide alike."""
    return Room(
        min(room.device_bytes or 0 for room in rooms),
        min(room.host_bytes or 0 for room in rooms),
        all(room.has_deepspeed for room in rooms),
    )
