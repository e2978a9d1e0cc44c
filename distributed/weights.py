"""Does a folder hold the weights that a model needs? Asked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from ..recipes.errors import UserError
from .checkpoint.fragments import FragmentReader
from .model import BuiltModel, base_name

SHOWN = 5


def check_base(built: BuiltModel, reader: FragmentReader) -> None:
    """Raises UserError that names missing tensors and other shapes. Tensors that the model has no use for are no
    error: folders carry heads and buffers of older versions."""
    stored = set(reader.names())
    missing = [name for name in built.base.values() if name not in stored]
    shapes = [
        f"{there} is {reader.spec(there).shape} in the files and {built.shapes[name]} in config.json"
        for name, there in built.base.items()
        if there in stored and reader.spec(there).shape != built.shapes[name]
    ]
    refuse_stored_buffers(built, reader, stored)
    if missing or shapes:
        raise UserError(
            "model.path: the weights do not fit config.json.\n"
            + _listed("missing from the files", [name for name in built.layout.names(missing) if name not in stored])
            + _listed("other shapes", shapes)
            + "Give a folder whose config.json belongs to its weights."
        )


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


def refuse_stored_buffers(built: BuiltModel, reader: FragmentReader, stored: Set[str]) -> None:
    """Buffers are computed, neither loaded nor saved: one that holds something learned (gemma4's layer_scalar) would be
    lost without a word. Raises UserError for those."""
    buffers = {
        base_name(f"{prefix}.{name}"): buffer
        for prefix, module in built.loss_model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    lost = [name for name, buffer in buffers.items() if name in stored and not _is_stored(reader, name, buffer)]
    if lost:
        raise UserError(
            "model.path: models of this type keep learned values in buffers, which cannot be trained with yet.\n"
            + _listed("buffers", lost).rstrip()
        )


def _is_stored(reader: FragmentReader, name: str, buffer: Tensor) -> bool:
    if reader.spec(name).shape != tuple(buffer.shape):
        return False
    return reader.read(name, ((0, buffer.numel()),)).to(buffer.dtype).equal(buffer.cpu().flatten())


def _listed(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    more = f"\n    … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"  {title}:\n    " + "\n    ".join(items[:SHOWN]) + more + "\n"
