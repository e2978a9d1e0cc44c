"""Loading recipes from text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.recipes.load import LoadedRecipe, load_recipe
from ftlaunch.recipes.problems import Problem, RecipeError

SMALLEST = "model: {path: m}\ndata:\n  train:\n    - path: rows.jsonl\n"

Load = Callable[..., LoadedRecipe]
Problems = Callable[..., list[Problem]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(text, *overrides, environ={}, **options)` of a file named recipe.yaml in an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def from_text(text: str, *overrides: str, environ: Mapping[str, str] | None = None, **options: Any) -> LoadedRecipe:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe("recipe.yaml", overrides, environ=environ or {"HOME": str(tmp_path)}, **options)

    return from_text


@pytest.fixture
def problems(load: Load) -> Problems:
    """The problems of a text that must not load."""

    def of_text(text: str, *overrides: str, **options: Any) -> list[Problem]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides, **options)
        return list(caught.value.problems)

    return of_text
