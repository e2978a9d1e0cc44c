"""The seam between a training method and everything else.

A method says three things: how a row becomes a sample, how samples become a batch, and what the loss of a batch
is. It knows no ranks, no process groups and no files. `encode` and `collate` run in background readers and in
`ftlaunch plan`, so they work on numpy; only `loss` sees tensors, and uses nothing but their methods.

Shapes: B sequences in a micro-batch, S tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from ..schema import RowFormat

IGNORED = -100
"""Target of a position that predicts nothing (the field's convention, torch's `ignore_index`)."""

Row = Mapping[str, Any]


class RowId(NamedTuple):
    """Where a row lies: enough to find it again by hand."""

    source: str
    file: str
    row: int
    """Zero-based number within its block."""
    block: int
    """Zero-based number of the block (row group, byte range) within its file."""
    file_row: int | None = None
    """Zero-based number within its file, where that is known without reading what stands before."""

    def __str__(self) -> str:
        row = f"block {self.block}, row {self.row}" if self.file_row is None else f"row {self.file_row}"
        return f"{self.source}: {self.file}, {row}"


@dataclass(frozen=True)
class Sample:
    """A tokenised row, or a piece of one.

    `input_ids` [S] int32. `supervised` [S] bool: token i is to be predicted from the tokens before it; element 0
    is never predicted, whatever it says.
    """

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    row: RowId

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return int(np.count_nonzero(self.supervised[1:]))


@dataclass(frozen=True)
class Rejected:
    """A row that nothing can be learned from. `reason` is a short constant that counters are keyed by; `detail`
    says more about this row."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, as numpy, before it goes to the device.

    `input_ids` [B, S] int64; `position_ids` [B, S] int64, restarting at 0 with every sample of a packed
    sequence; `targets` [B, S] int64: the token that position i predicts, or `IGNORED`. Padding has no targets.
    `rows[b]` are the rows in sequence b. `num_tokens` counts real tokens.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    rows: tuple[tuple[RowId, ...], ...]
    num_tokens: int


@dataclass(frozen=True)
class LossTerms:
    """The loss of one micro-batch as a sum, never a mean: the loop divides by the weight of the whole step.

    `metrics` maps a name to (sum, weight) pairs that the loop adds up over micro-batches and ranks.
    """

    loss_sum: torch.Tensor
    metrics: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)


class TokenEncoder(Protocol):
    """What a method needs of a tokenizer. All return (input_ids [S] int32, mask [S] bool); begin- and end-of-
    sequence tokens are there exactly once."""

    @property
    def takes_documents(self) -> bool:
        """Whether the chat template has a place of its own for retrieved documents."""
        ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        train_on: str,
        documents: Sequence[Any] | None = None,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Render a conversation by the chat template; the mask marks what `train_on` and the messages' own flags
        supervise."""
        ...

    def prompt_completion(self, prompt: str, completion: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Prompt, then completion, then end of sequence; the mask marks completion and end."""
        ...

    def text(self, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """A document and its end of sequence; the mask is all true."""
        ...


class Models(Protocol):
    """The models a loss may use. `policy(batch)` gives per-token losses [B, S] in fp32, 0 where ignored."""

    def policy(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor: ...


class Method(Protocol):
    """A training method. Adding one: a file beside this, a union member in the schema, a line in `table.py`, a
    recipe, its tests."""

    needs: frozenset[str]
    """What must be built besides the trained model ("reference", "teacher", "value_head")."""

    def encode(self, row: Row, row_format: RowFormat, encoder: TokenEncoder) -> Sample | Rejected:
        """Tokenise a row whose columns already have their standard names. The sample's `row` is filled by the
        caller. Raises ValueError for a row that is malformed rather than empty."""
        ...

    def collate(self, bins: Sequence[Sequence[Sample]], length: int) -> Batch:
        """Lay bins of samples out as sequences of `length` tokens; an empty bin becomes padding of no weight."""
        ...

    def weight(self, batch: Batch) -> float:
        """What this batch adds to the divisor of the step's loss; known before any forward pass."""
        ...

    def loss(self, models: Models, batch: Mapping[str, torch.Tensor]) -> LossTerms:
        """The summed loss of a micro-batch."""
        ...
