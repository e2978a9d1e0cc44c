"""`ftlaunch plan`: what a recipe would do, from what can be read here. Starts nothing and imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

from ..cluster.table import build_submitted, is_submitted
from ..distributed import storage
from ..distributed.data.index import Index
from ..recipes.formats import require_readable
from ..recipes.load import LoadedRecipe, as_stored
from ..recipes.redact import redact
from ..recipes.schema import Recipe
from ..recipes.section import Section
from .hardware import Machine
from .plan_cost import CostPlan, plan_cost
from .plan_data import SourcePlan, describe, index_source, keys_of, named_sources
from .plan_duration import DurationPlan, plan_duration
from .plan_model import (
    ModelPlan,
    PlannedFile,
    SavePlan,
    plan_checkpoint,
    plan_model,
    plan_saving,
)
from .plan_strategy import StrategyPlan, plan_strategy
from .plan_world import BatchPlan, WorldPlan, plan_batch, plan_world, world_problems, world_warnings
from .submit import need_of
from .unknown import Unknown, then

T = TypeVar("T")


@dataclass(frozen=True)
class SourceLine:
    """A source that could or could not be looked at."""

    name: str
    split: str
    found: SourcePlan | Unknown


@dataclass(frozen=True)
class ModelLine:
    """A model in numbers."""

    model_type: str
    parameters: int
    trainable: int
    dtype: str


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a run. `recipe` is whole; `defaults` are the dotted keys in it whose values
    nobody wrote; `problems` are why a run would be refused here."""

    name: str
    run: str
    recipe: Mapping[str, Any]
    defaults: tuple[str, ...]
    machine: Machine
    world: WorldPlan | Unknown
    batch: BatchPlan | Unknown
    sources: tuple[SourceLine, ...]
    duration: DurationPlan
    model: ModelLine | Unknown
    checkpoint: tuple[PlannedFile, ...] | Unknown
    saving: SavePlan | Unknown
    launch: tuple[str, ...]
    """What is started where, a line each; empty for a cluster that this machine joins."""
    cost: CostPlan | Unknown | None
    """None: for a cluster that is not paid by the hour."""
    strategy: StrategyPlan | Unknown
    warnings: tuple[str, ...]
    problems: tuple[str, ...]


def make_plan(loaded: LoadedRecipe, machine: Machine, *, sample: bool = False) -> Plan:
    """Look at data and model and plan the run. Raises UserError for what the user must mend first."""
    recipe = loaded.recipe
    world = plan_world(recipe.cluster, machine)
    found = [
        (split, name, source, index_source(source, name, key))
        for (split, name, source), key in zip(named_sources(recipe), keys_of(recipe), strict=True)
    ]
    for _, name, _, index in found:
        if isinstance(index, Index):
            require_readable(index.sources[0].format, recipe.method.type, f"source {name}")
    lines = tuple(
        SourceLine(name, split, then(index, partial(describe, split, name, source)))
        for split, name, source, index in found
    )
    model = plan_model(recipe)
    files = then(model, partial(plan_checkpoint, recipe))
    strategy = then(model, lambda known: then(world, lambda on: plan_strategy(recipe, known, on, machine)))
    plan = Plan(
        name=recipe.name,
        run=storage.join(recipe.checkpoint.path, recipe.name),
        recipe=as_stored(loaded).model_dump(mode="json"),
        defaults=tuple(default_keys(recipe)),
        machine=machine,
        world=world,
        batch=then(world, lambda known: plan_batch(recipe, known.ranks)),
        sources=lines,
        duration=_duration(recipe, lines, {name: index for split, name, _, index in found if split == "train"}, sample),
        model=then(model, partial(_model_line, recipe)),
        checkpoint=files,
        saving=then(files, lambda all_: then(world, lambda known: plan_saving(recipe, all_, known.nodes, machine))),
        launch=_launch(recipe),
        cost=plan_cost(recipe.cluster),
        strategy=strategy,
        warnings=(
            *loaded.warnings,
            *_about(world, lambda known: world_warnings(recipe.cluster, known, machine)),
            *_about(strategy, lambda known: [known.warning] if known.warning else []),
        ),
        problems=tuple(_about(world, lambda known: world_problems(recipe.cluster, known, machine))),
    )
    redacted: Plan = map_texts(plan, lambda text: redact(text, loaded.secrets))
    return redacted


def _launch(recipe: Recipe) -> tuple[str, ...]:
    if not is_submitted(recipe.cluster):
        return ()
    return tuple(build_submitted(recipe.cluster, need_of(recipe, {})).render().splitlines())


def _duration(
    recipe: Recipe, lines: tuple[SourceLine, ...], indexes: Mapping[str, Index | Unknown], sample: bool
) -> DurationPlan:
    sources = [line.found for line in lines if line.split == "train"]
    if not sample:
        return plan_duration(recipe, sources, {})
    from .sampling import sample_sources  # the tokenizer's library is not needed otherwise

    stats = sample_sources(recipe, indexes)
    return (
        plan_duration(recipe, sources, {}, stats)
        if isinstance(stats, Unknown)
        else plan_duration(recipe, sources, stats)
    )


def _model_line(recipe: Recipe, model: ModelPlan) -> ModelLine:
    return ModelLine(model.model_type, model.parameters, model.trainable, recipe.model.dtype)


def _about(known: T | Unknown, find: Callable[[T], list[str]]) -> list[str]:
    """What there is to say about something; nothing about what is not known."""
    return [] if isinstance(known, Unknown) else find(known)


def default_keys(section: Section, prefix: str = "") -> Iterator[str]:
    """Dotted keys of values that no file and no override gave."""
    for name in type(section).model_fields:
        key = f"{prefix}{name}"
        value = getattr(section, name)
        if name not in section.model_fields_set:
            yield key
        elif isinstance(value, Section):
            yield from default_keys(value, f"{key}.")
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                yield from default_keys(item, f"{key}.{number}.") if isinstance(item, Section) else ()


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_texts(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_texts(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: map_texts(getattr(value, field.name), change) for field in fields(value)})
    return value


def to_json(value: Any) -> Any:
    """Plain data; what is unknown becomes the text `unknown: REASON`."""
    if isinstance(value, Unknown):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, tuple | list) else value


def unknowns(value: Any, place: str = "") -> Iterator[tuple[str, Unknown]]:
    """(where, why) of everything in a plan that could not be found out."""
    if isinstance(value, Unknown):
        yield place, value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from unknowns(getattr(value, field.name), f"{place}.{field.name}" if place else field.name)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from unknowns(item, f"{place}.{number}")
