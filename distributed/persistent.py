"""Which buffers of a model are stored, and in which dtypes they are held."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """Where a module keeps a buffer."""

    owner: nn.Module
    key: str

    @property
    def value(self) -> Tensor:
        """The buffer as it is now."""
        value = self.owner._buffers[self.key]
        assert value is not None
        return value


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Place]]:
    """Name and place of every buffer that files have."""
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{key}".removeprefix("."), Place(owner, key)


def set_dtypes(causal_lm: Any, dtype: torch.dtype, make: Callable[[torch.dtype], nn.Module]) -> None:
    """Give the buffers of a model that was made in fp32 the dtypes that transformers holds them in where the model is
    opened in `dtype`: those of a model that is made in it, but for what it keeps in fp32. `make` makes one."""
    floating = [(name, place) for name, place in persistent_buffers(causal_lm) if place.value.is_floating_point()]
    if dtype == torch.float32 or not floating:
        return
    made = {name: place.value.dtype for name, place in persistent_buffers(make(dtype))}
    precise = [re.compile(name.replace("*", ".*")) for name in causal_lm._keep_in_fp32_modules_strict or ()]
    for name, place in floating:
        is_kept = any(pattern.search(name) for pattern in precise)
        place.owner._buffers[place.key] = place.value.to(torch.float32 if is_kept else made[name])
