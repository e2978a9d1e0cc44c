"""`a.b.c=value` from the command line, laid over a recipe's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .document import Document, read_document
from .problems import COMMAND_LINE, Origin, Problem, dotted
from .schema import Recipe

_ORIGIN = Origin(COMMAND_LINE)


class Override(NamedTuple):
    """A dotted key and the YAML text of its value."""

    key: str
    text: str


class _NoPlaceError(Exception):
    """An override names a place that cannot be."""


def parse_overrides(texts: Sequence[str], document: Document) -> list[Override]:
    """Split `key=value` texts; those that are none become problems of the document."""
    overrides = []
    for text in texts:
        key, equals, value = text.partition("=")
        if equals and all(key.split(".")):
            overrides.append(Override(key, value))
        else:
            document.problems.append(Problem(text, "not an override", "write key.sub=value", _ORIGIN))
    return overrides


def apply_override(document: Document, override: Override, environ: Mapping[str, str]) -> None:
    """Set one value, read as YAML; `train.max_grad_norm=` sets null. Sections on the way are made where they are
    missing."""
    read = read_document(override.text, _ORIGIN, environ=environ, root=override.key)
    if not read.problems:
        set_value(document, override.key, read.data)
    document.adopt(read)


def set_value(document: Document, key: str, value: Any) -> None:
    """Set a dotted key on behalf of the command line; a place that cannot be becomes a problem."""
    *parents, last = key.split(".")
    try:
        target, path = document.data, ""
        for part, following in zip(parents, key.split(".")[1:], strict=True):
            target, path = _enter(document, target, path, part, following), dotted(path, part)
        _put(target, path, last, value)
    except _NoPlaceError as error:
        document.problems.append(Problem(key, str(error), "", _ORIGIN))
        return
    document.forget(key)
    document.origins[key] = _ORIGIN


def _enter(document: Document, target: Any, path: str, part: str, following: str) -> Any:
    """The section or list `part` of `target`; made new where there is none, a list if a number follows."""
    if isinstance(target, list):
        index = _index(target, path, part)
        if index < len(target):
            return target[index]
    elif isinstance(target, dict) and target.get(part) is not None:
        return target[part]
    fresh: Any = [] if following.isdecimal() else _fresh_section(dotted(path, part))
    _put(target, path, part, fresh)
    document.origins[dotted(path, part)] = _ORIGIN
    return fresh


def _fresh_section(key: str) -> dict[str, Any]:
    """A new section begins with the type it has by default, so that `method.train_on=all` needs no method.type."""
    if key not in Recipe.model_fields:
        return {}
    default = Recipe.model_construct().model_dump(warnings=False).get(key) or {}
    return {"type": default["type"]} if "type" in default else {}


def _put(target: Any, path: str, part: str, value: Any) -> None:
    if isinstance(target, dict):
        target[part] = value
        return
    if not isinstance(target, list):
        raise _NoPlaceError(f"{path} is no section, so nothing can be set below it")
    index = _index(target, path, part)
    target[index : index + 1] = [value]


def _index(target: list[Any], path: str, part: str) -> int:
    """An item's number; one past the end appends."""
    if not part.isdecimal() or int(part) > len(target):
        numbers = f"0 to {len(target) - 1}, {len(target)} appends one" if target else "0 appends the first"
        raise _NoPlaceError(f"{path} is a list; its items are numbers ({numbers})")
    return int(part)
