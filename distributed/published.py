"""The small files at a checkpoint's root, so that `from_pretrained` opens it: configuration, tokenizer, template."""

from __future__ import annotations

import json
from typing import Any

from ..recipes.schema import Recipe
from . import storage
from .data.chat import with_defaults
from .data.template import template_source
from .model import BuiltModel
from .model_files import ModelFolder, find_model, is_hub_id, template_text

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
        files["adapter_config.json"] = _as_json(_adapter_config(recipe, built, folder))
    template = published_template(recipe, folder)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def published_template(recipe: Recipe, folder: ModelFolder) -> str | None:
    """The recipe's template, with its variables as defaults, so that the model is asked as it was trained; None: the
    tokenizer's own as it is."""
    given, variables = recipe.model.chat_template, recipe.model.chat_template_kwargs
    text = None if given is None else template_text(given)
    if not variables:
        return text
    tokenizer = folder if recipe.model.tokenizer is None else find_model(recipe.model.tokenizer, weights=False)
    return with_defaults(text or template_source(tokenizer) or "", variables)


def _model_config(recipe: Recipe, built: BuiltModel) -> dict[str, Any]:
    config: dict[str, Any] = built.config.to_dict()
    return config | {
        "architectures": [type(built.loss_model.causal_lm).__name__],
        "dtype": recipe.model.dtype,
        "use_cache": True,
    }


def base_of(recipe: Recipe, folder: ModelFolder) -> str:
    """What an adapter names as its base: the hub id, or the very folder, never a run, which may go on."""
    if is_hub_id(recipe.model.path):
        return recipe.model.path
    return str(storage.local_path(folder.url).absolute()) if storage.is_local(folder.url) else folder.url


def read_base(checkpoint: str) -> str:
    """The base that a saved adapter names."""
    base: str = json.loads(storage.read_bytes(storage.join(checkpoint, "adapter_config.json")))[
        "base_model_name_or_path"
    ]
    return base


def _adapter_config(recipe: Recipe, built: BuiltModel, folder: ModelFolder) -> dict[str, Any]:
    config: dict[str, Any] = built.loss_model.model.peft_config["default"].to_dict()  # type: ignore[union-attr, index]
    base = {"base_model_name_or_path": base_of(recipe, folder), "revision": recipe.model.revision}
    return config | base | {"inference_mode": True}


def _as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, default=_plain).encode() + b"\n"


def _plain(value: object) -> Any:
    """peft's configuration holds sets and enumerations."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
