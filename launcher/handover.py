"""A loaded recipe as JSON, for the driver on another machine: whole, with its secrets, so for no eyes but its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipes.load import LoadedRecipe
from ..recipes.problems import Origin
from ..recipes.schema import Recipe


def pack(loaded: LoadedRecipe) -> dict[str, Any]:
    """What `unpack` reads back. Values that nobody wrote stay unwritten, so that they are still known as defaults."""
    return {
        "recipe": loaded.recipe.model_dump_json(exclude_unset=True),
        "path": loaded.path,
        "warnings": loaded.warnings,
        "secrets": loaded.secrets,
        "origins": {key: [origin.file, origin.line] for key, origin in loaded.origins.items()},
    }


def unpack(packed: Mapping[str, Any]) -> LoadedRecipe:
    """The same recipe."""
    return LoadedRecipe(
        recipe=Recipe.model_validate_json(packed["recipe"]),
        path=packed["path"],
        warnings=tuple(packed["warnings"]),
        secrets=tuple(packed["secrets"]),
        origins={key: Origin(file, line) for key, (file, line) in packed["origins"].items()},
    )
