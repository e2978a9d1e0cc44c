"""A plan as people read it, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..distributed.estimate.memory import Memory
from ..recipes.errors import UserError
from ..recipes.load import LoadedRecipe
from . import units
from .hardware import this_machine
from .plan import Plan, make_plan, to_json, unknowns
from .plan_cost import cost_text
from .plan_data import SourcePlan
from .unknown import Unknown

LISTED_FILES = 6


def show_plan(loaded: LoadedRecipe, *, as_json: bool, sample: bool, strict: bool) -> int:
    """Print the plan of a recipe. Raises UserError, after printing, when the run would be refused here, and with
    `strict` when something is unknown."""
    plan = make_plan(loaded, this_machine(), sample=sample)
    if as_json:
        print(json.dumps(to_json(plan), indent=2, ensure_ascii=False))
    else:
        Console().print(render_plan(plan), soft_wrap=True, highlight=False)
    if plan.problems:
        raise UserError("\n".join(plan.problems))
    missing = list(unknowns(plan))
    if strict and missing:
        raise UserError("--strict: " + "\n".join(f"{place} is {value}" for place, value in missing))
    return 0


def render_plan(plan: Plan) -> RenderableType:
    """The plan for a terminal."""
    parts: list[RenderableType] = [_heading("recipe", "dim values are defaults"), Text("\n").join(_recipe(plan))]
    parts += [_heading("run"), _facts(_run_facts(plan))]
    if plan.launch:
        parts += [_heading("starts"), Text("\n".join(f"  {line}" for line in plan.launch))]
    parts += [_heading("data"), _facts(_source_facts(plan))]
    parts += [_heading("model"), _facts(_model_facts(plan))]
    if plan.warnings:
        parts += [_heading("warnings"), *(Text(warning, style="yellow") for warning in plan.warnings)]
    return Group(*parts)


def _heading(title: str, remark: str = "") -> Text:
    return Text("\n").append(title, style="bold").append(f"   {remark}" if remark else "", style="dim")


def _recipe(plan: Plan) -> Iterator[Text]:
    return (
        Text("  " * depth + line, style="dim" if _is_default(key, plan.defaults) else "")
        for key, depth, line in outline(plan.recipe)
    )


def _is_default(key: str, defaults: tuple[str, ...]) -> bool:
    return any(key == default or key.startswith(f"{default}.") for default in defaults)


def outline(value: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, int, str]]:
    """(dotted key, depth, YAML line) of nested mappings and lists of mappings."""
    for name, item in value.items():
        key = f"{prefix}{name}"
        if isinstance(item, Mapping) and item:
            yield key, depth, f"{name}:"
            yield from outline(item, f"{key}.", depth + 1)
        elif isinstance(item, list) and any(isinstance(entry, Mapping) for entry in item):
            yield key, depth, f"{name}:"
            for number, entry in enumerate(item):
                yield from _list_item(outline(entry, f"{key}.{number}.", depth + 2))
        else:
            yield key, depth, f"{name}: {json.dumps(item, ensure_ascii=False)}"


def _list_item(lines: Iterator[tuple[str, int, str]]) -> Iterator[tuple[str, int, str]]:
    """Set a dash before the first line."""
    key, depth, line = next(lines)
    yield key, depth - 1, f"- {line}"
    yield from lines


def _facts(facts: Iterator[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, value in facts:
        table.add_row(
            Text(f"  {label}", style="dim"), Text(value, style="yellow" if value.startswith("unknown") else "")
        )
    return table


def _run_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "directory", plan.run
    yield "world", _world(plan)
    yield "batch", _batch(plan)
    duration = plan.duration
    about = "" if duration.exact else "about "
    yield "steps", _number(duration.steps, about)
    yield "epochs", str(duration.epochs) if isinstance(duration.epochs, Unknown) else f"about {duration.epochs:.3g}"
    yield "tokens", _number(duration.tokens, "about ")
    if plan.cost is not None:
        yield "cost", str(plan.cost) if isinstance(plan.cost, Unknown) else cost_text(plan.cost)


def _number(value: float | Unknown, about: str) -> str:
    return str(value) if isinstance(value, Unknown) else f"{about}{units.count(value)}"


def _world(plan: Plan) -> str:
    world = plan.world
    if isinstance(world, Unknown):
        return str(world)
    ranks = f"{world.ranks} rank" + ("s" if world.ranks > 1 else "")
    nodes = f"{world.nodes} node" + ("s" if world.nodes > 1 else "")
    here = "" if plan.launch else f"; this machine has {plan.machine.gpus} GPUs, {plan.machine.cores} cores"
    return f"{ranks} on {nodes} ({world.ranks_per_node} each), {world.device}{here}"


def _batch(plan: Plan) -> str:
    batch = plan.batch
    if isinstance(batch, Unknown):
        return str(batch)
    waste = (
        f"; {batch.empty_sequences} empty sequences a step, {batch.waste:.1%} waste" if batch.empty_sequences else ""
    )
    return (
        f"{batch.global_batch_size} sequences a step = {batch.micro_batch_size} (micro-batch) x {batch.ranks} (ranks) "
        f"x {batch.accumulation} (accumulation){waste}; {batch.streams} streams"
    )


def _source_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    for line in plan.sources:
        found = line.found
        yield line.name, str(found) if isinstance(found, Unknown) else _source(found)
    held_out = plan.recipe["data"]["eval"]
    if isinstance(held_out, Mapping):
        yield "held out", f"{held_out['fraction']:.1%} of the rows of each source, by a hash of the row"


def _source(source: SourcePlan) -> str:
    rows = "rows unknown" if isinstance(source.rows, Unknown) else f"{source.rows:,} rows"
    files = f"{source.files:,} file" + ("s" if source.files > 1 else "")
    weight = [f"weight {source.weight:g}"] if source.weight else []
    row_format = f"{source.format} (found from its columns)" if source.format_is_found else source.format
    return ", ".join([source.split, row_format, rows, f"{files} of {units.size(source.bytes)}", *weight, source.path])


def _model_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    model = plan.model
    if isinstance(model, Unknown):
        yield "parameters", str(model)
        return
    yield "type", model.model_type
    yield "parameters", units.count(model.parameters)
    yield "trained", f"{units.count(model.trainable)} ({model.trainable / model.parameters:.2%}), masters in float32"
    yield "published as", model.dtype
    yield "checkpoint", _checkpoint(plan)
    yield "saved", _saving(plan)
    yield "strategy", _strategy(plan)
    yield "memory", _memory(plan)


def _checkpoint(plan: Plan) -> str:
    files = plan.checkpoint
    if isinstance(files, Unknown):
        return str(files)
    total = sum(file.bytes for file in files)
    listed = ", ".join(f"{file.name} {units.size(file.bytes)}" for file in files[:LISTED_FILES])
    more = f", and {len(files) - LISTED_FILES} more" if len(files) > LISTED_FILES else ""
    return f"{units.size(total)} in {len(files)} files: {listed}{more}"


SAVING = {
    "sync": "while training waits",
    "async": "beside the training, from a copy of {size} in the memory of each node",
    "auto": "beside the training where each node has twice {size} of memory free for a copy, else while it waits",
}


def _saving(plan: Plan) -> str:
    saving = plan.saving
    return (
        str(saving) if isinstance(saving, Unknown) else SAVING[saving.mode].format(size=units.size(saving.copy_bytes))
    )


def _strategy(plan: Plan) -> str:
    strategy = plan.strategy
    if isinstance(strategy, Unknown):
        return str(strategy) if plan.recipe["strategy"]["type"] == "auto" else plan.recipe["strategy"]["type"]
    return strategy.why.removeprefix("strategy ") or strategy.chosen["type"]


def _memory(plan: Plan) -> str:
    if isinstance(plan.strategy, Unknown):
        return str(plan.strategy)
    memory = plan.strategy.memory
    parts = ", ".join(f"{name} {units.size(size)}" for name, size in memory.parts.items() if size)
    host = ", ".join(_on_host(memory))
    device = f"about {units.size(memory.total)} a rank (an estimate, at its most in {memory.moment}: {parts})"
    return f"{device}; on the host {host}" if host else device


def _on_host(memory: Memory) -> Iterator[str]:
    if memory.offloaded:
        yield f"{units.size(memory.offloaded)} offloaded"
    if memory.staging:
        yield f"{units.size(memory.staging)} of copies where checkpoints are written beside the training"
