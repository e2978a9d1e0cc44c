"""A copy in host memory of what this rank supplies to a checkpoint, so that training goes on while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import torch

from .content import Content
from .fragments import Fragment
from .layout import DTYPES
from .parts import Held, PartPlan, Source, as_planned

ALIGNMENT = 64
"""Bytes; more than any dtype needs, and a whole cache line."""


class Staging:
    """The memory for the copies: allocated at the first save, kept for the later ones (a fresh page costs more than
    the copy into it). `pinned`: page-locked, so that a GPU copies at full speed and without waiting for each tensor."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, content: Content, plans: Mapping[str, PartPlan]) -> Content:
        """The same content, which no longer changes with what it was made of; until the next copy."""
        parts = {stem: self._copy_part(stem, source, plans[stem]) for stem, source in content.parts.items()}
        if self._pinned:
            torch.cuda.synchronize()
        state, metrics = deepcopy(content.state), dict(content.metrics)
        return replace(content, parts=parts, state=state, metrics=metrics, copied=True)

    def _copy_part(self, stem: str, source: Source, plan: PartPlan) -> Source:
        if stem not in self._buffers:
            size = plan.copied_bytes() + ALIGNMENT * len(plan.specs)
            self._buffers[stem] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        place, copies = 0, []
        for position, fragment in enumerate(as_planned(source, plan)):
            if fragment.spec.name in plan.frozen:
                copies.append(fragment)  # it stays as it is
                continue
            ranges, held = plan.supplied(position), Held(fragment)
            count = sum(stop - start for start, stop in ranges)
            dtype = DTYPES[fragment.spec.dtype]
            room = self._buffers[stem][place : place + count * dtype.itemsize]
            target = room.view(getattr(torch, dtype.torch_name))
            done = 0
            for start, stop in ranges:
                target[done : done + stop - start].copy_(held.values(start, stop), non_blocking=self._pinned)
                done += stop - start
            copies.append(Fragment(fragment.spec, ranges, target))
            place += -(-len(room) // ALIGNMENT) * ALIGNMENT
        return copies.__iter__
