"""Weights that `save_pretrained` or `torch.save` wrote as pickle: `pytorch_model.bin`, or several with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...recipes.errors import UserError
from ..pickles import load_pickled
from .base import Foreign, MappedTensors

SINGLE = ("pytorch_model.bin", "pytorch_model_fsdp.bin")
"""Of transformers; of accelerate, whose FSDP gathered the whole model."""

INDEX = "pytorch_model.bin.index.json"
NUMBERED = re.compile(r"pytorch_model-\d{5}-of-(\d{5})\.bin")

NO_MOMENTS = "there is no optimizer state beside these weights"


def find(folder: Path) -> Foreign | None:
    """See `base.py`."""
    names = pickled_names({path.name for path in folder.iterdir()}, folder)
    if not names:
        return None
    what = f"pickled weights ({len(names)} file{'s' * (len(names) > 1)}) in {folder}"
    return Foreign(what, open_pickled(folder, names), None, 0, None, NO_MOMENTS)


def pickled_names(present: set[str], folder: Path) -> list[str]:
    """The files that together are a model. Raises UserError for ones that are missing."""
    single = next((name for name in SINGLE if name in present), None)
    if single is not None:
        return [single]
    numbered = {match[0]: int(match[1]) for match in map(NUMBERED.fullmatch, present) if match}
    if INDEX in present:
        try:
            wanted = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} is no index with a weight_map ({error!r}). Copy it again.") from error
    elif numbered:
        count = max(numbered.values())
        wanted = [f"pytorch_model-{number:05d}-of-{count:05d}.bin" for number in range(1, count + 1)]
    else:
        return []
    missing = [name for name in wanted if name not in present]
    if missing:
        raise UserError(f"{folder} does not hold {', '.join(missing[:5])}. Copy the folder again, whole.")
    return wanted


def open_pickled(folder: Path, names: list[str]) -> MappedTensors:
    """Their tensors. Raises UserError for what is not a plain state dict."""
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= _tensors(folder / name)
    return MappedTensors.whole(tensors)


def _tensors(path: Path) -> Mapping[str, torch.Tensor]:
    content: Any = load_pickled(path)
    if isinstance(content, dict) and content.keys() == {"model"}:
        content = content["model"]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict but a {type(content).__name__}.")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(f"{path} holds more than tensors by their names: {', '.join(others[:5])}.")
    return content
