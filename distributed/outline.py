"""A model that has been built, as `estimate` wants it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .estimate.outline import Held, Outline, make_outline
from .model import BuiltModel, adapter_name, base_name, is_adapter_tensor
from .quantized import CODE_BYTES, SCALE_BYTES


def outline_of(built: BuiltModel, config: Mapping[str, Any]) -> Outline | None:
    """`config`: config.json of the model's folder."""
    return make_outline(_tensors(built), config)


def _tensors(built: BuiltModel) -> Iterator[Held]:
    trained = {name for name, parameter in built.loss_model.named_parameters() if parameter.requires_grad}
    for name, shape in built.shapes.items():
        published = adapter_name(name) if is_adapter_tensor(name) else base_name(name)
        packing = built.packed.get(published)
        packed = packing.rows * packing.blocks * (CODE_BYTES + SCALE_BYTES) if packing else 0
        whole = (packing.rows, packing.columns) if packing else shape
        yield Held(published, whole, name in trained, name in built.tables, packed)
