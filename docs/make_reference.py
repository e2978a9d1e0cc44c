"""Write docs/recipe-reference.md from the recipe's schema: every key with its type, default and docstring.

python docs/make_reference.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ftlaunch.recipes.json_schema import JsonSchema, Place, all_places, options, recipe_schema
from ftlaunch.recipes.wording import expected

TARGET = Path(__file__).resolve().parent / "recipe-reference.md"

HEAD = """# Recipe reference

Every key of a recipe. Made from the docstrings in `recipes/schema.py` by `python docs/make_reference.py`; do not edit.

`ftlaunch plan recipe.yaml` prints all values of your recipe, defaults included. `ftlaunch schema` prints the same as
JSON Schema, with which editors complete and check recipes. Unknown keys are errors. Files are YAML 1.2: `1e-4` is a
number, `on` and `no` are text. `${VAR}` is replaced by an environment variable and never printed or stored.

On the command line `key.sub=value` sets any of these keys, list items by number: `data.train.0.weight=0.9`.
"""


def reference() -> str:
    """The whole page."""
    root = recipe_schema()
    return "\n".join([HEAD, *(section for place in all_places() for section in _section(root, place))])


def _section(root: JsonSchema, place: Place) -> Iterator[str]:
    definition = next(each for each in [root, *root["$defs"].values()] if each["properties"] is place.properties)
    yield f"## {_heading(place)}\n"
    yield definition["description"].replace("\n", " ") + "\n"
    yield "| Key | Type | Default | Meaning |\n|---|---|---|---|"
    for name, schema in place.properties.items():
        default = _default(schema, required=name in definition.get("required", []))
        kind = _type(root, name, schema).replace("|", "\\|")
        yield f"| `{name}` | {kind} | {default} | {_meaning(root, name, schema)} |"
    yield ""


def _heading(place: Place) -> str:
    key = place.key or "The recipe"
    return f"{key}, `type: {place.tag}`" if place.tag else key


def _type(root: JsonSchema, name: str, schema: JsonSchema) -> str:
    return "name of the kind" if "const" in schema else expected(root, schema).replace(" (keys and values)", "")


def _default(schema: JsonSchema, *, required: bool) -> str:
    if required or "default" not in schema:
        return "required" if required else "from the file's name"
    value = schema["default"]
    if isinstance(value, dict):
        return f"`type: {value['type']}`" if "type" in value else "as below" if value else "`{}`"
    return f"`{json.dumps(value)}`"


def _meaning(root: JsonSchema, name: str, schema: JsonSchema) -> str:
    """The field's docstring; where that says no more than its section's, pydantic keeps only the latter."""
    if "const" in schema:
        return f"`{schema['const']}`"
    said = schema.get("description") or options(root, schema)[0]["description"]
    return str(said).replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
