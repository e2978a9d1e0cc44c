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
    num_tokens = 0
    for b, samples in enumerate(bins):
        if samples:
            num_tokens += _lay_out_sequence(samples, input_ids[b], position_ids[b], targets[b])
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        targets=targets,
        rows=tuple(tuple([sample.row for sample in samples]) for samples in bins),
        num_tokens=num_tokens,
    )


def _lay_out_sequence(samples: Sequence[Sample], input_ids: Ints, position_ids: Ints, targets: Ints) -> int:
    """Fill one sequence; its tokens without padding. A few operations a sequence, not a sample: short samples are many,
    and readers share the interpreter with the loop."""
    pieces = [sample.input_ids for sample in samples]
    lengths = [*map(len, pieces)]
    ends = np.cumsum(lengths)
    stop = int(ends[-1])
    ids = input_ids[:stop]
    np.concatenate(pieces, out=ids)
    supervised = np.concatenate([sample.supervised for sample in samples])
    targets[: stop - 1] = np.where(supervised[1:], ids[1:], IGNORED)
    targets[ends[:-1] - 1] = IGNORED  # nothing predicts the first token of a sample
    if len(samples) > 1:
        lengths.append(len(input_ids) - stop)
        position_ids -= np.repeat(np.concatenate([[0], ends]), lengths)
    return stop


def count_targets(batch: Batch) -> float:
    """Number of tokens that count in the loss."""
    return float(np.count_nonzero(batch.targets != IGNORED))


def cross_entropy(models: Models, batch: Mapping[str, torch.Tensor]) -> LossTerms:
    """Summed negative log-likelihood of the supervised tokens, in nats."""
    return LossTerms(loss_sum=models.policy(batch).sum())
