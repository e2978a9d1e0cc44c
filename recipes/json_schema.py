"""The recipe's JSON Schema: what editors complete from, and the map that errors and hints are explained by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from .problems import dotted
from .schema import Recipe

JsonSchema = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """One kind of section: `key` is dotted, `[]` standing for any list item; `tag` is its `type` where several
    kinds may stand there; `properties` are its keys."""

    key: str
    tag: str
    properties: JsonSchema

    def __str__(self) -> str:
        return f"{self.key} (type: {self.tag})" if self.tag else self.key


def schema_json() -> JsonSchema:
    """JSON Schema of a recipe file: as `Recipe`, but `cluster` may be a profile's name, `name` may be left out
    (then it is the file's), and where several types are possible `type` must be said."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["required"] = [key for key in schema["required"] if key != "name"]
    cluster = schema["properties"]["cluster"]
    tagged = {key: cluster.pop(key) for key in ("oneOf", "discriminator")}
    cluster["anyOf"] = [{"type": "string"}, tagged]
    for definition in schema["$defs"].values():
        if _is_member(schema, definition):
            definition["required"] = ["type", *definition.get("required", [])]
    return schema


def _is_member(schema: JsonSchema, definition: JsonSchema) -> bool:
    """Whether a definition is one of several that `type` tells apart."""
    mappings = [node["discriminator"]["mapping"].values() for node in _nodes(schema) if "discriminator" in node]
    return any(resolve(schema, {"$ref": ref}) is definition for mapping in mappings for ref in mapping)


def _nodes(value: Any) -> Iterator[JsonSchema]:
    if isinstance(value, dict):
        yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _nodes(child)


def resolve(root: JsonSchema, schema: JsonSchema) -> JsonSchema:
    """Follow a `$ref` into `$defs`."""
    if "$ref" not in schema:
        return schema
    found: JsonSchema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return found


def options(root: JsonSchema, schema: JsonSchema) -> list[JsonSchema]:
    """The alternatives of a value, flat. What `type` tells apart counts as one."""
    schema = resolve(root, schema)
    if "anyOf" not in schema:
        return [schema]
    return [option for inner in schema["anyOf"] for option in options(root, inner)]


def members(root: JsonSchema, schema: JsonSchema) -> dict[str, JsonSchema]:
    """`type` -> section, for a schema with a discriminator."""
    mapping: dict[str, str] = schema["discriminator"]["mapping"]
    return {tag: resolve(root, {"$ref": ref}) for tag, ref in mapping.items()}


@cache
def recipe_schema() -> JsonSchema:
    """`schema_json()`, made once; not to be changed."""
    return schema_json()


@cache
def all_places() -> tuple[Place, ...]:
    """Every kind of section of a recipe, outermost first."""
    root = recipe_schema()
    return tuple(_places(root, root, ""))


def _places(root: JsonSchema, schema: JsonSchema, key: str, tag: str = "") -> Iterator[Place]:
    for option in options(root, schema):
        if "discriminator" in option:
            for name, member in members(root, option).items():
                yield from _places(root, member, key, name)
        elif "properties" in option:
            yield Place(key, tag, option["properties"])
            for name, inner in option["properties"].items():
                yield from _places(root, inner, dotted(key, name))
        elif option.get("type") == "array" and "items" in option:
            yield from _places(root, option["items"], f"{key}[]")
