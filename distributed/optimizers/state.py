"""Which state each optimizer keeps of a tensor: known from its shape alone, so that `plan` says it too. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Shape = tuple[int, ...]
Parts = Mapping[str, Shape]
"""Part of the state (the name it has in checkpoints) -> its shape."""


def adamw(shape: Shape, is_table: bool) -> Parts:
    """Both moments."""
    return {"exp_avg": shape, "exp_avg_sq": shape}


def adafactor(shape: Shape, is_table: bool) -> Parts:
    """The second moment's means over columns and over rows; of vectors the second moment itself."""
    if len(shape) < 2:
        return {"exp_avg_sq": shape}
    return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}


def muon(shape: Shape, is_table: bool) -> Parts:
    """Momentum of hidden matrices; AdamW's moments of everything else."""
    return {"momentum_buffer": shape} if is_hidden_matrix(shape, is_table) else adamw(shape, is_table)


def is_hidden_matrix(shape: Shape, is_table: bool) -> bool:
    """What Muon is made for: matrices, but no embeddings and no head."""
    return len(shape) == 2 and not is_table


STATE: Mapping[str, Callable[[Shape, bool], Parts]] = {
    "adamw": adamw,
    "adamw_8bit": adamw,
    "adafactor": adafactor,
    "muon": muon,
}
"""train.optimizer -> (shape, whether it is an embedding or the head) -> state."""

BYTES = {"adamw": 4.0, "adamw_8bit": 1 + 4 / 256, "adafactor": 4.0, "muon": 4.0}
"""Memory per element of state; 8-bit blocks of 256 have a scale each. In checkpoints it is always 4."""
