"""What kind of value a column holds, in the words of errors: enough to see that two files do not belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

NOTHING = "nothing"
"""Only nulls, which go with every kind."""

_OF_JSON: dict[type, str] = {
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): NOTHING,
}


def kind_of_value(value: Any) -> str:
    """The kind of a JSON value."""
    return _OF_JSON.get(type(value), type(value).__name__)


def kinds_of_row(row: Mapping[str, Any]) -> dict[str, str]:
    """Column -> kind, of one row."""
    return {name: kind_of_value(value) for name, value in row.items()}


def kinds_of_schema(schema: Any) -> dict[str, str]:
    """Column -> kind, of an Arrow schema."""
    return {name: _kind_of_type(type_) for name, type_ in zip(schema.names, schema.types, strict=True)}


def _kind_of_type(type_: Any) -> str:
    import pyarrow.types as is_type

    if is_type.is_dictionary(type_):
        type_ = type_.value_type
    tests: tuple[tuple[Callable[[Any], bool], str], ...] = (
        (lambda t: is_type.is_string(t) or is_type.is_large_string(t) or is_type.is_string_view(t), "text"),
        (lambda t: is_type.is_map(t) or is_type.is_struct(t), "an object"),
        (is_type.is_nested, "a list"),
        (is_type.is_boolean, "true or false"),
        (lambda t: is_type.is_integer(t) or is_type.is_floating(t) or is_type.is_decimal(t), "a number"),
        (is_type.is_null, NOTHING),
    )
    return next((kind for test, kind in tests if test(type_)), str(type_))
