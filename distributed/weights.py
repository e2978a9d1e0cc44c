"""Does a folder hold the weights that a model needs? Asked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence

from ..recipes.errors import UserError
from .checkpoint.fragments import FragmentReader
from .model import BuiltModel

SHOWN = 5


def check_base(built: BuiltModel, reader: FragmentReader) -> None:
    """Raises UserError that names missing tensors and other shapes. Tensors that the model has no use for are no
    error: folders carry heads and buffers of older versions."""
    parameters = dict(built.loss_model.named_parameters())
    stored = set(reader.names())
    missing = [name for name in built.base.values() if name not in stored]
    shapes = [
        f"{there} is {reader.spec(there).shape} in the files and {tuple(parameters[name].shape)} in config.json"
        for name, there in built.base.items()
        if there in stored and reader.spec(there).shape != tuple(parameters[name].shape)
    ]
    if missing or shapes:
        raise UserError(
            "model.path: the weights do not fit config.json.\n"
            + _listed("missing from the files", missing)
            + _listed("other shapes", shapes)
            + "Give a folder whose config.json belongs to its weights."
        )


def _listed(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    more = f"\n    … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"  {title}:\n    " + "\n    ".join(items[:SHOWN]) + more + "\n"
