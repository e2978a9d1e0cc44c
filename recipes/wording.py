"""Plain words for what a value should be and what it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .json_schema import JsonSchema, options

_TYPES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "object": "a section (keys and values)",
    "array": "a list",
}

_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("at least {}", lambda value, bound: value >= bound),
    "exclusiveMinimum": ("above {}", lambda value, bound: value > bound),
    "maximum": ("at most {}", lambda value, bound: value <= bound),
    "exclusiveMaximum": ("below {}", lambda value, bound: value < bound),
    "enum": ("one of {}", lambda value, allowed: value in allowed),
    "const": ("{}", lambda value, allowed: value == allowed),
    "pattern": ("matching {}", lambda value, pattern: re.search(pattern, value) is not None),
    "maxLength": ("of at most {} characters", lambda value, bound: len(value) <= bound),
    "minItems": ("of at least {} items", lambda value, bound: len(value) >= bound),
    "maxItems": ("of at most {} items", lambda value, bound: len(value) <= bound),
}


def kind(value: Any) -> str:
    """JSON Schema's name for the type of a plain value; whole floats such as 1e9 are integers."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    kinds = {type(None): "null", int: "integer", str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def option_kind(option: JsonSchema) -> str:
    """The type a schema without alternatives asks for."""
    if "discriminator" in option:
        return "object"
    kind_name: str = option.get("type", "string")
    return kind_name


def fits(option: JsonSchema, value: Any) -> bool:
    """Whether a value keeps an option's bounds (its type is known to be right)."""
    return all(test(value, option[name]) for name, (_, test) in _BOUNDS.items() if name in option)


def expected(root: JsonSchema, schema: JsonSchema) -> str:
    """`a whole number, at least 1, or null`."""
    described = [_option(root, option) for option in options(root, schema)]
    return " or ".join(dict.fromkeys(described))


def _option(root: JsonSchema, option: JsonSchema) -> str:
    if "enum" in option:
        return f"one of {', '.join(option['enum'])}"
    if "const" in option:
        return f"`{option['const']}`"
    name = _TYPES[option_kind(option)]
    if "items" in option:
        name = f"a list, each item {expected(root, option['items'])}"
    elif "prefixItems" in option:
        each = ", ".join(expected(root, item) for item in option["prefixItems"])
        return f"a list of {len(option['prefixItems'])} ({each})"
    bounds = [words.format(option[key]) for key, (words, _) in _BOUNDS.items() if key in option]
    return ", ".join([name, *bounds])


def found(value: Any) -> str:
    """`text '1_000'`, `nothing`, `a list`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"text {value[:80]!r}"
    if isinstance(value, (int, float)):
        return f"number {value!r:.80}"
    return "a list" if isinstance(value, list) else "a section (keys and values)"


_BOOLEAN_WORDS = {"yes", "no", "on", "off", "y", "n", "true", "false"}


def conversion_remedy(wanted: set[str], value: Any) -> str:
    """What to change about a value of the wrong type, where that is clear."""
    if isinstance(value, str) and "boolean" in wanted and value.lower() in _BOOLEAN_WORDS:
        return "write true or false, without quotes (in YAML 1.2 yes, no, on and off are text)"
    if isinstance(value, str) and wanted & {"integer", "number"}:
        return _number_remedy(value)
    if isinstance(value, (bool, int, float)) and "string" in wanted:
        return "put it in quotes"
    if wanted in ({"array"}, {"array", "null"}):
        return "write it as a list: [ … ]" if not isinstance(value, dict) else "begin each item with `- `"
    if value is None and "object" in wanted:
        return "put keys below it, or leave it out"
    return ""


def _number_remedy(text: str) -> str:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return ""
    if "," in text or "_" in text:
        return "write the number without underscores and commas"
    return "write the number without quotes (a number from ${VAR} needs a line of its own, outside { } and [ ])"
