"""How full sequences would be, with packing and without: the real packer, on lengths drawn from those seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..distributed.data.pack import Address, PackBuffer, Waiting, next_bin
from ..distributed.data.parts import LENGTH_MULTIPLE
from ..recipes.schema import Recipe

LENGTHS = 4_000
"""Samples drawn; enough that the last, partly filled sequence does not count."""


@dataclass(frozen=True)
class Fill:
    """Shares of real tokens in what goes through the model (the rest is padding), and the sequences that packing needs
    for a hundred samples."""

    packed: float
    padded: float
    sequences_per_100: float


def estimate_fill(lengths: Sequence[int], recipe: Recipe, seed: int) -> Fill:
    """Of at least one length, none above data.sequence_length."""
    drawn = np.random.default_rng(seed).choice(np.asarray(lengths), LENGTHS)
    bins = _packed_bins(drawn.tolist(), recipe)
    full = bins * recipe.data.sequence_length
    return Fill(float(drawn.sum()) / full, _padded_fill(drawn, recipe), 100 * bins / LENGTHS)


def _packed_bins(lengths: Sequence[int], recipe: Recipe) -> int:
    coming = [Waiting((), Address(0, 0), length) for length in lengths]
    buffer = PackBuffer()

    def refill() -> None:
        while coming and len(buffer) < recipe.data.pack_buffer:
            buffer.add(coming.pop())

    bins = 0
    while next_bin(buffer, recipe.data.sequence_length, refill):
        bins += 1
    return bins


def _padded_fill(lengths: np.typing.NDArray[np.int64], recipe: Recipe) -> float:
    """One sample a sequence, each micro-batch as long as its longest, rounded up."""
    size = recipe.train.micro_batch_size
    batches = lengths[: len(lengths) // size * size].reshape(-1, size) if size <= len(lengths) else lengths[None]
    longest = np.ceil(batches.max(axis=1) / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    padded = np.minimum(longest, recipe.data.sequence_length) * batches.shape[1]
    return float(batches.sum() / padded.sum())
