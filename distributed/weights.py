"""Does a folder hold the weights that a model needs? Asked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..recipes.errors import UserError
from .buffers import stored_shapes
from .checkpoint.fragments import FragmentReader
from .initialise import unset_buffers
from .model import BuiltModel

SHOWN = 5


def check_base(built: BuiltModel, reader: FragmentReader) -> list[str]:
    """Raises UserError that names missing tensors and other shapes. Tensors that the model has no use for are no
    error: folders carry heads and buffers of older versions. Returns the names of buffers that the files leave out and
    that the model's own initialisation sets, which is what transformers takes for them."""
    stored = set(reader.names())
    shapes = {there: built.shapes[name] for name, there in built.base.items()}
    buffers = stored_shapes(built)
    left_out = [name for name in buffers if name not in stored]
    missing = [name for name in shapes if name not in stored]
    if left_out:
        unset = {built.buffers[name] for name in unset_buffers(built.loss_model)}
        missing += [name for name in left_out if name in unset]
    others = [
        f"{name} is {reader.spec(name).shape} in the files and {shape} in config.json"
        for name, shape in {**shapes, **buffers}.items()
        if name in stored and reader.spec(name).shape != shape
    ]
    if missing or others:
        raise UserError(
            "model.path: the weights do not fit config.json.\n"
            + _listed("missing from the files", [name for name in built.layout.names(missing) if name not in stored])
            + _listed("other shapes", others)
            + "Give a folder whose config.json belongs to its weights."
        )
    return left_out


def check_stored(directory: str, shapes: Mapping[str, tuple[int, ...]], reader: FragmentReader) -> None:
    """Whether a checkpoint holds the very tensors, of these shapes by name, that a run goes on with: where
    --accept-changes let another model or adapter in, ranges of flat tensors would be other values. Raises UserError."""
    stored = set(reader.names())
    missing = [name for name in shapes if name not in stored]
    others = [
        f"{name} is {reader.spec(name).shape} in the checkpoint and {shape} in the recipe"
        for name, shape in shapes.items()
        if name in stored and reader.spec(name).shape != shape
    ]
    unused = sorted(stored - shapes.keys())
    if missing or others or unused:
        raise UserError(
            f"{directory} is a checkpoint of another model or adapter than the recipe's.\n"
            + _listed("other shapes", others)
            + _listed("missing from it", missing)
            + _listed("not in the recipe's model", unused)
            + "Set model and adapter back, or begin a new run with --fresh."
        )


def _listed(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    more = f"\n    … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"  {title}:\n    " + "\n    ".join(items[:SHOWN]) + more + "\n"
