"""Running again: what changed between a stored recipe and the one at hand, and what that means for the run.

Both recipes must have been through the same redaction (`load.as_stored`), or a secret would look like a change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from .problems import dotted
from .schema import Recipe

Kind = Literal["continues", "extends", "stops"]

DURATIONS = ("num_epochs", "max_steps", "max_tokens")

# The longest prefix of a key that is listed here decides. What continues must not change which rows a step trains
# on, nor the weights beyond floating-point noise.
KINDS: dict[str, Kind] = {
    "": "stops",  # a key nobody thought about is not waved through
    "name": "continues",  # the run was found by it
    "model": "stops",  # other weights, tokens or trainable parameters
    "model.attention": "continues",  # the same function by another kernel
    "model.allow_pickle": "continues",  # the same weights, read otherwise
    "adapter": "stops",  # another set of trainable tensors, or another scale
    "method": "stops",  # another objective
    "data": "stops",  # other rows, or the same in another order; eval sets too: losses would not be comparable
    "data.train[].storage_options": "continues",  # the way to the files; they are the same, or the index says no
    "data.eval[].storage_options": "continues",  # as above
    "data.reader_processes": "continues",  # the same steps, made by others
    "data.disk_cache_gb": "continues",  # the same blocks, kept nearer
    "train": "stops",  # another optimisation
    "train.micro_batch_size": "continues",  # the loss of a step does not depend on the layout (promise 2)
    "train.activation_checkpointing": "continues",  # recomputes the same numbers
    "train.compile": "continues",  # the same function in other kernels
    "train.deterministic": "continues",  # the same function in other kernels
    "evaluate": "continues",  # measures; trains nothing
    "strategy": "continues",  # checkpoints load under any strategy (promise 4)
    "checkpoint": "continues",  # cadence, retention and place
    "track": "continues",  # reporting
    "cluster": "continues",  # any world size gives the same loss (promise 2)
}


_LIST_INDEX = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Change:
    """One difference. `key` is dotted; `old` and `new` are plain data, None where a key was not there."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


@dataclass(frozen=True)
class Comparison:
    """All differences, in the recipe's order."""

    changes: tuple[Change, ...]

    def of_kind(self, kind: Kind) -> tuple[Change, ...]:
        """The changes of one kind."""
        return tuple(change for change in self.changes if change.kind == kind)

    @property
    def continues(self) -> tuple[Change, ...]:
        """Changes that the unfinished run goes on with, after listing them."""
        return self.of_kind("continues")

    @property
    def extends(self) -> tuple[Change, ...]:
        """A larger duration: a finished run goes on."""
        return self.of_kind("extends")

    @property
    def stops(self) -> tuple[Change, ...]:
        """Changes that make it another run."""
        return self.of_kind("stops")


def compare(old: Recipe, new: Recipe) -> Comparison:
    """What changed from `old` to `new`."""
    found: list[Change] = []
    _differences(_plain(old), _plain(new), "", found)
    return Comparison(tuple(found))


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Plain data in which the default duration is spelled out: no duration means one epoch."""
    data = recipe.model_dump(mode="json")
    if all(data["train"][key] is None for key in DURATIONS):
        data["train"]["num_epochs"] = 1
    return data


def _differences(old: Any, new: Any, key: str, found: list[Change]) -> None:
    if old == new and type(old) is type(new):
        return
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        for name in {**old, **new}:
            _differences(old.get(name), new.get(name), dotted(key, name), found)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            _differences(before, after, dotted(key, index), found)
    else:
        found.append(Change(key, old, new, _kind(key, old, new)))


def _kind(key: str, old: Any, new: Any) -> Kind:
    if key.removeprefix("train.") in DURATIONS and isinstance(old, int) and isinstance(new, int):
        return "extends" if new > old else "stops"
    key = _LIST_INDEX.sub("[]", key)
    while key not in KINDS:
        key = key.rpartition(".")[0]
    return KINDS[key]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
