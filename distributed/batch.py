"""A micro-batch on its way to the device, and the generator that its dropout is drawn from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..recipes.methods.base import IGNORED, Batch
from .initialise import keyed_seed


def on_device(batch: Batch, device: str) -> dict[str, Tensor]:
    """The tensors of a batch, each [B, S] int64."""
    arrays = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "targets": batch.targets}
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def seed_dropout(seed: int, step: int, first_bin: int) -> None:
    """Seed the default generators anew for one micro-batch, so that dropout depends on which bins it holds and not
    on which rank computes it, and so that no generator state has to be saved."""
    torch.manual_seed(keyed_seed(seed, "dropout", step, first_bin))


def empty_batch(length: int = 8) -> Batch:
    """One sequence of padding: what a rank computes on while others still have data."""
    shape = (1, length)
    return Batch(
        input_ids=np.zeros(shape, dtype=np.int64),
        position_ids=np.arange(length, dtype=np.int64)[None],
        targets=np.full(shape, IGNORED, dtype=np.int64),
        rows=((),),
        num_tokens=0,
    )
