"""`strategy: {type: auto}`: a strategy from an estimate and from what there is. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ...recipes.checks import run_checks
from ...recipes.schema import Recipe
from ...recipes.schema_strategy import Auto, ChosenStrategy, Ddp, Deepspeed, Fsdp
from ..data.memory import size_text
from .memory import Memory, estimate
from .outline import Outline
from .setting import Room, Setting

USABLE = 0.85
"""Share of a device's memory that tensors may take: an estimate may be a tenth too low, and communication and the
allocator's gaps take some."""


class Candidate(NamedTuple):
    """A strategy, and when it is taken: the first that fits."""

    strategy: ChosenStrategy
    why: str


CANDIDATES = (
    Candidate(Ddp(), "the whole model fits on every rank, so nothing is gathered"),
    Candidate(Fsdp(shard="node"), "it fits when the ranks of a node share it, so weights stay within nodes"),
    Candidate(Fsdp(), "it fits when all ranks share it"),
    Candidate(
        Deepspeed(stage=2, offload_optimizer="cpu"), "it fits only with the optimizer's state in the host's memory"
    ),
    Candidate(
        Deepspeed(stage=3, offload_optimizer="cpu"),
        "it fits only when all ranks share it and the optimizer's state is in the host's memory",
    ),
    Candidate(Fsdp(offload="cpu"), "it fits only with weights and optimizer in the host's memory"),
)
"""From the fastest to the leanest."""


class Tried(NamedTuple):
    """A candidate and what a rank would take."""

    candidate: Candidate
    memory: Memory


@dataclass(frozen=True)
class Choice:
    """What was chosen among `tried`, the last of which it is where one `fits`; otherwise the one that takes least."""

    strategy: ChosenStrategy
    memory: Memory
    fits: bool
    tried: tuple[Tried, ...]
    usable_bytes: int
    setting: Setting

    def __str__(self) -> str:
        takes = f"about {size_text(self.memory.total)} a rank, of {size_text(self.usable_bytes)} that may be used"
        name = described(self.strategy)
        if not self.fits:
            return f"strategy auto: {name}: nothing fits by the estimate, and this takes least ({takes})"
        others = "; ".join(f"{described(t.candidate.strategy)} would take {_size(t.memory)}" for t in self.tried[:-1])
        return f"strategy auto: {name}: {self.tried[-1].candidate.why} ({takes}{'; ' if others else ''}{others})"


def described(strategy: ChosenStrategy) -> str:
    """`fsdp`, or `deepspeed {stage: 2, offload_optimizer: cpu}`: a stage, and what is not its default."""
    given = strategy.model_dump(include={"stage"}) | strategy.model_dump(exclude_defaults=True, exclude={"type"})
    inner = ", ".join(f"{key}: {value}" for key, value in given.items())
    return f"{strategy.type} {{{inner}}}" if inner else strategy.type


def _size(memory: Memory) -> str:
    host = f" and {size_text(memory.offloaded)} of the host's" if memory.offloaded else ""
    return f"{size_text(memory.total)}{host}"


def with_strategy(recipe: Recipe, strategy: ChosenStrategy) -> Recipe:
    """The recipe under another strategy."""
    return recipe.model_copy(update={"strategy": strategy})


def choose(recipe: Recipe, outline: Outline, setting: Setting, room: Room) -> Choice:
    """The first candidate that fits into what is usable, or else the one that takes least. Ranks that are given the
    same room choose alike; what is usable must be known."""
    usable = usable_bytes(recipe, room)
    assert usable is not None
    tried: list[Tried] = []
    for candidate in possible(recipe, setting, room):
        memory = estimate(with_strategy(recipe, candidate.strategy), outline, setting)
        tried.append(Tried(candidate, memory))
        if memory.total <= usable and _fits_host(memory, room):
            return Choice(candidate.strategy, memory, True, tuple(tried), usable, setting)
    least = min(tried, key=lambda one: (not _fits_host(one.memory, room), one.memory.total))
    return Choice(least.candidate.strategy, least.memory, False, tuple(tried), usable, setting)


def usable_bytes(recipe: Recipe, room: Room) -> int | None:
    """What tensors may take on a device; None where neither the recipe nor the room says."""
    said = recipe.strategy.memory_gb if isinstance(recipe.strategy, Auto) else None
    known = [bytes_ for bytes_ in (room.device_bytes, None if said is None else int(said * 1e9)) if bytes_ is not None]
    return int(USABLE * min(known)) if known else None


def possible(recipe: Recipe, setting: Setting, room: Room) -> Iterator[Candidate]:
    """The candidates that mean something here, and that the rest of the recipe allows."""
    for candidate in CANDIDATES:
        strategy = candidate.strategy
        if not run_checks(with_strategy(recipe, strategy)) and all(
            rule(strategy, setting, room) for rule in (_by_node, _by_host, _installed)
        ):
            yield candidate


def _by_node(strategy: ChosenStrategy, setting: Setting, room: Room) -> bool:
    """Sharding within nodes is something of its own where there are several, with several ranks each."""
    is_hybrid = isinstance(strategy, Fsdp) and strategy.shard == "node"
    is_even = setting.ranks % setting.nodes == 0
    return not is_hybrid or (setting.nodes > 1 and setting.ranks_per_node > 1 and is_even)


def _by_host(strategy: ChosenStrategy, setting: Setting, room: Room) -> bool:
    """On a CPU the host's memory is the device's."""
    offloads = (isinstance(strategy, Fsdp) and strategy.offload == "cpu") or (
        isinstance(strategy, Deepspeed) and strategy.offload_optimizer == "cpu"
    )
    return not offloads or setting.device != "cpu"


def _installed(strategy: ChosenStrategy, setting: Setting, room: Room) -> bool:
    return room.has_deepspeed or not isinstance(strategy, Deepspeed)


def _fits_host(memory: Memory, room: Room) -> bool:
    return room.host_bytes is None or memory.offloaded <= room.host_bytes
