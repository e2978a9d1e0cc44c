"""The small files at a checkpoint's root, so that `from_pretrained` opens it: configuration, tokenizer, template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..recipes.schema import Recipe
from .model import BuiltModel
from .model_files import ModelFolder, find_model

OURS = frozenset({"config.json", "chat_template.jinja"})
"""Files that are written anew rather than copied."""


def published_files(recipe: Recipe, built: BuiltModel, folder: ModelFolder) -> dict[str, bytes]:
    """Name -> content."""
    files = folder.small_files()
    if recipe.model.tokenizer is not None:
        files.update(find_model(recipe.model.tokenizer, weights=False).small_files())
    # With an adapter too: generate and pull need the tokenizer beside it.
    files["config.json"] = _as_json(_model_config(recipe, built))
    if built.has_adapter:
        del files["config.json"]
        files["adapter_config.json"] = _as_json(_adapter_config(recipe, built))
    if recipe.model.chat_template is not None:
        files["chat_template.jinja"] = template_text(recipe.model.chat_template).encode()
    return files


def template_text(chat_template: str) -> str:
    """A template given inline, or the content of the .jinja file it names."""
    path = Path(chat_template)
    return path.read_text() if chat_template.endswith(".jinja") else chat_template


def _model_config(recipe: Recipe, built: BuiltModel) -> dict[str, Any]:
    config: dict[str, Any] = built.config.to_dict()
    return config | {
        "architectures": [type(built.loss_model.causal_lm).__name__],
        "dtype": recipe.model.dtype,
        "use_cache": True,
    }


def _adapter_config(recipe: Recipe, built: BuiltModel) -> dict[str, Any]:
    config: dict[str, Any] = built.loss_model.model.peft_config["default"].to_dict()  # type: ignore[union-attr, index]
    return config | {"base_model_name_or_path": recipe.model.path, "inference_mode": True}


def _as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, default=_plain).encode() + b"\n"


def _plain(value: object) -> Any:
    """peft's configuration holds sets and enumerations."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
