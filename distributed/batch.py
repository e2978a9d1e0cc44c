"""A micro-batch on its way to the device, and the generator that its dropout is drawn from.

Shapes: B sequences, S tokens in a sequence, N samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..recipes.methods.base import IGNORED, Batch
from .initialise import keyed_seed


def on_device(batch: Batch, device: str) -> dict[str, Tensor]:
    """The tensors of a batch, each [B, S] int64. `position_ids` only where they restart: models count by themselves,
    once for all sequences, and need not look for packed samples. With them `sample_starts` [N + 1] int32: where each
    of the N samples starts when the sequences lie end to end, and the end."""
    arrays = {"input_ids": batch.input_ids, "targets": batch.targets}
    if (batch.position_ids[:, 1:] == 0).any():
        starts = np.flatnonzero(batch.position_ids.ravel() == 0)
        arrays["position_ids"] = batch.position_ids
        arrays["sample_starts"] = np.append(starts, batch.position_ids.size).astype(np.int32)
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def seed_dropout(seed: int, step: int, first_bin: int, device: str) -> None:
    """Seed the device's default generator anew for one micro-batch, so that dropout depends on which bins it holds and
    not on which rank computes it, and so that no generator state has to be saved.

    Not `torch.manual_seed`: it also tells every backend that is not in use, each of which formats the stack to remember
    the call for its start, and MTIA's keeps all of them (torch 2.13): a millisecond and a leak for every micro-batch.
    """
    number = keyed_seed(seed, "dropout", step, first_bin)
    torch.default_generator.manual_seed(number)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(number)


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
