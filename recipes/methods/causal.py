"""What every causal language-modelling method shares: the layout of a batch, and the summed cross-entropy.

Shapes: B sequences in a micro-batch, S tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .base import IGNORED, Batch, LossTerms, Models, Sample

if TYPE_CHECKING:
    import torch

Ints = npt.NDArray[np.int64]


def lay_out(bins: Sequence[Sequence[Sample]], length: int) -> Batch:
    """Bins of samples as sequences of `length` tokens, padded with token 0 that nothing is learned from.

    A sequence with one sample keeps counting positions through its padding: causal attention already hides it, and
    models take their fast path when positions never restart.
    """
    shape = (len(bins), length)
    input_ids = np.zeros(shape, dtype=np.int64)
    position_ids = np.tile(np.arange(length, dtype=np.int64), (len(bins), 1))
    targets = np.full(shape, IGNORED, dtype=np.int64)
    for b, samples in enumerate(bins):
        _lay_out_sequence(samples, input_ids[b], position_ids[b], targets[b])
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        targets=targets,
        rows=tuple(tuple(sample.row for sample in samples) for samples in bins),
        num_tokens=sum(len(sample) for samples in bins for sample in samples),
    )


def _lay_out_sequence(samples: Sequence[Sample], input_ids: Ints, position_ids: Ints, targets: Ints) -> None:
    start = 0
    for sample in samples:
        stop = start + len(sample)
        input_ids[start:stop] = sample.input_ids
        targets[start : stop - 1] = np.where(sample.supervised[1:], sample.input_ids[1:], IGNORED)
        if start:
            position_ids[start:] -= position_ids[start]
        start = stop
    if len(samples) > 1 and start < len(input_ids):
        position_ids[start:] -= position_ids[start]


def count_targets(batch: Batch) -> float:
    """Number of tokens that count in the loss."""
    return float(np.count_nonzero(batch.targets != IGNORED))


def cross_entropy(models: Models, batch: Mapping[str, torch.Tensor]) -> LossTerms:
    """Summed negative log-likelihood of the supervised tokens, in nats."""
    return LossTerms(loss_sum=models.policy(batch).sum())
