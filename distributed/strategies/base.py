"""The seam between the loop and a strategy (FSDP2, DeepSpeed): how a model is laid out over ranks.

The engine owns gradient averaging, clipping and precision. Whatever it does inside, gradients are those of
`loss_sum / weight_total` over the whole global batch, and the norm is the norm of that gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ..checkpoint.fragments import Fragment, FragmentReader


class Engine(Protocol):
    """A prepared model with its optimizer."""

    module: torch.nn.Module
    """The wrapped `LossModel`; called by the loop with a batch."""

    parts: Sequence[str]
    """What `fragments` and `load` know: "model" (published dtype and names), and for resuming "master" (fp32, only
    where it says more than "model") and the optimizer's own ("exp_avg", ...: `optimizers/state.py`)."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Peak rate times schedule, for the coming step."""
        ...

    def backward(self, loss_sum: torch.Tensor, weight_total: float, *, last_micro_batch: bool) -> None:
        """Accumulate the gradient of loss_sum / weight_total; collective."""
        ...

    def step(self) -> float:
        """Clip, update, clear gradients; returns the gradient norm before clipping. A norm that is not finite
        changes nothing; the caller must look."""
        ...

    def fragments(self, part: str) -> Iterator[Fragment]:
        """What this rank holds of `part`, one tensor at a time, where it lies; the same names, in the same order, on
        every rank (a rank that holds nothing of a tensor yields it with no ranges)."""
        ...

    def load(self, part: str, reader: FragmentReader) -> None:
        """Fill `part` from stored tensors; every rank reads just its ranges."""
        ...

    def load_base(self, reader: FragmentReader) -> None:
        """Fill the base model's tensors from the model folder that the run starts from."""
        ...

    def optimizer_state(self) -> Mapping[str, Any]:
        """What else must be stored with the optimizer (step counts), small and the same on every rank."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `optimizer_state`."""
        ...
