"""Every mistake in a recipe's data, found by walking it along the JSON Schema.

Pydantic decides what is valid. It reports unions as one list of errors per alternative, and tags between the keys;
this walk says the same in terms of what the user wrote.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

from .hints import hint
from .json_schema import JsonSchema, members, options, recipe_schema
from .problems import Problem, dotted
from .wording import conversion_remedy, expected, fits, found, kind, option_kind


def explain(data: Any) -> Iterator[Problem]:
    """The problems of a recipe's plain data, without origins; none for a valid one."""
    root = recipe_schema()
    yield from _value(root, root, data, "")


def _value(root: JsonSchema, schema: JsonSchema, value: Any, key: str) -> Iterator[Problem]:
    alternatives = options(root, schema)
    wanted = {option_kind(option) for option in alternatives}
    accepted = {kind(value), "number"} if kind(value) == "integer" else {kind(value)}
    fitting = [option for option in alternatives if option_kind(option) in accepted]
    if not fitting or (isinstance(value, float) and not math.isfinite(value)):
        message = f"expected {expected(root, schema)}; found {found(value)}"
        yield Problem(key, message, conversion_remedy(wanted, value))
        return
    verdicts = [list(_option(root, option, value, key)) for option in fitting]
    if all(verdicts):
        yield from verdicts[0]


def _option(root: JsonSchema, option: JsonSchema, value: Any, key: str) -> Iterator[Problem]:
    if "discriminator" in option:
        yield from _tagged(root, option, value, key)
    elif "properties" in option:
        yield from _section(root, option, value, key)
    elif option.get("additionalProperties") is True:
        return  # whatever it holds, somebody else knows the keys
    elif option_kind(option) == "object":
        for name, item in value.items():
            yield from _value(root, option["additionalProperties"], item, dotted(key, name))
    elif not fits(option, value):
        message = f"expected {expected(root, option)}; found {found(value)}"
        yield Problem(key, message, _closest(value, option.get("enum", [])))
    elif option_kind(option) == "array":
        yield from _items(root, option, value, key)


def _items(root: JsonSchema, option: JsonSchema, values: list[Any], key: str) -> Iterator[Problem]:
    schemas = option.get("prefixItems") or [option["items"]] * len(values)
    for index, (schema, value) in enumerate(zip(schemas, values, strict=True)):
        yield from _value(root, schema, value, dotted(key, index))


def _tagged(root: JsonSchema, option: JsonSchema, value: dict[str, Any], key: str) -> Iterator[Problem]:
    known = members(root, option)
    types = ", ".join(known)
    tag = value.get("type")
    if "type" not in value:
        yield Problem(dotted(key, "type"), f"missing: which type of {key} this is", f"types are: {types}")
        # What is wrong whatever the type may be is worth saying now.
        properties = {name: schema for member in known.values() for name, schema in member["properties"].items()}
        yield from _keys(root, properties, value, key, f"{key} has")
    elif not isinstance(tag, str) or tag not in known:
        yield Problem(
            dotted(key, "type"), f"unknown type: expected one of {types}; found {found(tag)}", _closest(tag, known)
        )
    else:
        yield from _section(root, known[tag], value, key, f"{key} of type {tag} has")


def _section(
    root: JsonSchema, section: JsonSchema, value: dict[str, Any], key: str, has: str = ""
) -> Iterator[Problem]:
    yield from _keys(root, section["properties"], value, key, has or f"{key or 'a recipe'} has")
    for name in section.get("required", []):
        if name not in value:
            schema = section["properties"][name]
            yield Problem(dotted(key, name), f"missing: expected {expected(root, schema)}", _purpose(schema))


def _keys(root: JsonSchema, properties: JsonSchema, value: dict[str, Any], key: str, has: str) -> Iterator[Problem]:
    for name, item in value.items():
        if name in properties:
            yield from _value(root, properties[name], item, dotted(key, name))
        else:
            fallback = f"{has}: {', '.join(properties)}"
            yield Problem(dotted(key, name), "unknown key", hint(name, key, tuple(properties)) or fallback)


def _purpose(schema: JsonSchema) -> str:
    description: str = schema.get("description", "")
    return description.partition("\n")[0]


def _closest(value: Any, allowed: Any) -> str:
    close = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f"did you mean {close[0]}?" if close else ""
