"""What helps where a run does not fit: changes of the recipe, each with what the estimate says it comes to. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ...recipes.checks import run_checks
from ...recipes.schema import Lora, Recipe
from ...recipes.schema_strategy import Auto, Deepspeed, Fsdp
from ..data.memory import size_text
from .choose import choose, described
from .memory import Memory, estimate
from .outline import Outline, with_adapter
from .setting import Room, Setting

WORTH = 0.97
"""A change that leaves more than this share of the memory is not worth naming."""

MOST = 7
"""Changes that are named."""


class Remedy(NamedTuple):
    """A change, what it costs besides, and what a rank takes then; under which strategy, if `auto` chooses it."""

    change: str
    cost: str
    memory: Memory
    strategy: str = ""


class Changed(NamedTuple):
    """The same run, otherwise."""

    recipe: Recipe
    outline: Outline
    setting: Setting


Change = Callable[[Recipe, Outline, Setting], Iterator[tuple[str, str, Changed]]]


def _smaller_micro_batch(recipe: Recipe, outline: Outline, setting: Setting) -> Iterator[tuple[str, str, Changed]]:
    now = recipe.train.micro_batch_size
    for size in dict.fromkeys((now // 2, 1)):
        if 0 < size < now:
            other = _with(recipe, "train", micro_batch_size=size)
            yield f"train.micro_batch_size: {size}", "the same losses", Changed(other, outline, setting)


def _recomputed(recipe: Recipe, outline: Outline, setting: Setting) -> Iterator[tuple[str, str, Changed]]:
    if not recipe.train.activation_checkpointing:
        other = _with(recipe, "train", activation_checkpointing=True)
        yield (
            "train.activation_checkpointing: true",
            "the same losses, a third more compute",
            Changed(other, outline, setting),
        )


def _other_strategies(recipe: Recipe, outline: Outline, setting: Setting) -> Iterator[tuple[str, str, Changed]]:
    """Leaner ones; on a CPU what is offloaded is where it was. `auto` has looked at them itself."""
    if isinstance(recipe.strategy, Auto):
        return
    leaner: list[tuple[Fsdp | Deepspeed, str]] = [(Fsdp(), "the same losses, more traffic")]
    if setting.device != "cpu":
        away = Deepspeed(stage=3, offload_optimizer="cpu")
        leaner += [(away, "slower updates"), (Fsdp(offload="cpu"), "the same losses, slow steps")]
    for strategy, cost in leaner:
        if strategy != recipe.strategy:
            other = recipe.model_copy(update={"strategy": strategy})
            yield f"strategy: {_braced(strategy)}", cost, Changed(other, outline, setting)


def _braced(strategy: Fsdp | Deepspeed) -> str:
    name, _, rest = described(strategy).partition(" {")
    return f"{{type: {name}, {rest}" if rest else f"{{type: {name}}}"


def _leaner_optimizer(recipe: Recipe, outline: Outline, setting: Setting) -> Iterator[tuple[str, str, Changed]]:
    if recipe.train.optimizer == "adamw":
        other = _with(recipe, "train", optimizer="adamw_8bit")
        yield "train.optimizer: adamw_8bit", "moments in 8 bits", Changed(other, outline, setting)


def _adapter(recipe: Recipe, outline: Outline, setting: Setting) -> Iterator[tuple[str, str, Changed]]:
    if recipe.adapter is None and recipe.model.init == "pretrained" and not recipe.model.train_layers:
        other = recipe.model_copy(update={"adapter": Lora()})
        adapted = with_adapter(outline, Lora().rank)
        yield "adapter: {type: lora}", "trains an adapter, not the whole", Changed(other, adapted, setting)


def _shorter(recipe: Recipe, outline: Outline, setting: Setting) -> Iterator[tuple[str, str, Changed]]:
    length = recipe.data.sequence_length // 2
    if length >= 8:
        other = _with(recipe, "data", sequence_length=length)
        yield f"data.sequence_length: {length}", "longer rows are cut or dropped", Changed(other, outline, setting)


def _more_ranks(recipe: Recipe, outline: Outline, setting: Setting) -> Iterator[tuple[str, str, Changed]]:
    twice = replace(setting, ranks=2 * setting.ranks, nodes=2 * setting.nodes if setting.nodes > 1 else 1)
    yield f"twice as many ranks ({twice.ranks})", "the same losses", Changed(recipe, outline, twice)


def _smallest_and_recomputed(recipe: Recipe, outline: Outline, setting: Setting) -> Iterator[tuple[str, str, Changed]]:
    """Both of what changes no losses, where one is not enough."""
    smallest = list(_smaller_micro_batch(recipe, outline, setting))[-1:]
    for change, _, changed in smallest:
        for again, cost, both in _recomputed(*changed):
            yield f"{change} and {again}", cost, both


CHANGES: tuple[Change, ...] = (
    _smaller_micro_batch,
    _recomputed,
    _smallest_and_recomputed,
    _other_strategies,
    _more_ranks,
    _leaner_optimizer,
    _adapter,
    _shorter,
)
"""In the order in which one would try them: first what changes no losses."""


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def remedies(recipe: Recipe, outline: Outline, setting: Setting, room: Room) -> list[Remedy]:
    """The changes that help. Under a strategy that has been chosen: those that lessen what a rank takes; under `auto`,
    which may then choose otherwise: those with which something fits."""
    now = _weigh(Changed(recipe, outline, setting), room)
    found = []
    for make in CHANGES:
        for change, cost, changed in make(recipe, outline, setting):
            if not run_checks(changed.recipe):
                then = _weigh(changed, room)
                if then.fits if isinstance(recipe.strategy, Auto) else then.memory.total < WORTH * now.memory.total:
                    found.append(Remedy(change, cost, then.memory, then.strategy))
    return found


class Weighed(NamedTuple):
    """What a rank takes, whether that fits, and under which strategy where `auto` chose it."""

    memory: Memory
    fits: bool
    strategy: str = ""


def _weigh(changed: Changed, room: Room) -> Weighed:
    if isinstance(changed.recipe.strategy, Auto):
        choice = choose(*changed, room)
        return Weighed(choice.memory, choice.fits, described(choice.strategy))
    memory = estimate(*changed)
    return Weighed(memory, room.device_bytes is None or memory.total <= room.device_bytes)


def advice(recipe: Recipe, outline: Outline, setting: Setting, room: Room) -> str:
    """What a rank takes and by which part, and what to change, for people. Under `auto` what is usable is known."""
    memory = _weigh(Changed(recipe, outline, setting), room).memory
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {size_text(size)}" for name, size in parts if size > 0.01 * memory.total)
    there = f" of {size_text(room.device_bytes)}" if room.device_bytes else ""
    about = (
        f"By the estimate a rank takes {size_text(memory.total)}{there} in {memory.moment}, most of it {parts[0][0]} "
        f"({parts[0][1] / max(1, memory.total):.0%}): {shares}."
    )
    helpful = remedies(recipe, outline, setting, room)
    if not helpful:
        return f"{about} No single change of the recipe helps by the estimate: take a smaller model, or larger devices."
    return "\n".join([about, "What helps, each by itself:", *(f"  {_line(remedy)}" for remedy in helpful[:MOST])])


def _line(remedy: Remedy) -> str:
    under = f"{remedy.strategy}, " if remedy.strategy else ""
    host = f" and {size_text(remedy.memory.offloaded)} of the host's memory" if remedy.memory.offloaded else ""
    return f"{remedy.change}: {under}{size_text(remedy.memory.total)}{host} ({remedy.cost})"
