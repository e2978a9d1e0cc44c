"""Cross-entropy of a linear head, in chunks of positions, each of whose logits are made once.

While a chunk's logits are there, the gradients they lead to are made too, as if every position's loss counted once
(fused linear cross-entropy, as in Liger Kernel: Hsu et al. 2024, arXiv:2410.10989). Backward only scales them where
the losses were summed, which is what training does. Whoever weighs positions differently is right too: the hidden
states' gradient is scaled per position, and the head's, a sum over positions, is made again.

Shapes: B sequences, S tokens, H hidden size, V vocabulary, N supervised positions, C positions of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..recipes.methods.base import IGNORED


def linear_losses(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Losses [B, S] in fp32 of logits `hidden` [B, S, H] x `weight` [V, H], 0 where `targets` [B, S] is `IGNORED`.

    `rows`: C, the positions whose logits are held at once. Differentiable once in `hidden` and `weight`.
    """
    if torch.is_grad_enabled():
        losses: Tensor = _LinearLosses.apply(hidden, weight, targets, rows)  # type: ignore[no-untyped-call]
        return losses
    return _in_chunks(hidden, weight, targets, rows, (False, False)).losses


class _Made(NamedTuple):
    losses: Tensor
    hidden: Tensor | None
    """Gradient [B, S, H]."""
    weight: Tensor | None
    """Gradient [V, H]."""


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rows = rows
        losses, *ctx.gradients = _in_chunks(hidden, weight, targets, rows, ctx.needs_input_grad[:2])
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # They are scaled in place, so they serve one backward pass only.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or (gradients[1] is not None and not _is_one_number(upstream)):
            hidden, weight, targets = ctx.saved_tensors
            made = _in_chunks(hidden, weight, targets, ctx.rows, ctx.needs_input_grad[:2], upstream)
            return made.hidden, made.weight, None, None
        of_hidden, of_weight = gradients
        if of_hidden is not None:
            of_hidden.mul_(upstream.unsqueeze(-1))
        if of_weight is not None:
            of_weight.mul_(upstream[0, 0])
        return of_hidden, of_weight, None, None


def _is_one_number(upstream: Tensor) -> bool:
    """Whether all positions were given the same gradient, told without looking at the device: `sum` hands a single
    number down, expanded."""
    return all(size == 1 or stride == 0 for size, stride in zip(upstream.shape, upstream.stride(), strict=True))


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int,
    wanted: tuple[bool, bool],
    upstream: Tensor | None = None,
) -> _Made:
    """Losses, and the wanted gradients of their sum, weighted by `upstream` [B, S] if given."""
    positions = (targets != IGNORED).nonzero(as_tuple=True)
    supervised, labels = hidden[positions], targets[positions]
    losses = torch.empty_like(labels, dtype=torch.float32)
    of_supervised = torch.empty_like(supervised) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    weights = None if upstream is None else upstream[positions]
    # Chunks share their memory: on the CPU, fresh pages cost a fifth of the time.
    buffer = weight.new_empty(min(rows, len(labels)), len(weight))
    for start in range(0, len(labels), rows):
        chunk = slice(start, start + rows)
        part = supervised[chunk]
        scores = torch.mm(part, weight.t(), out=buffer[: len(part)]).float()
        losses[chunk] = _cross_entropy_(scores, labels[chunk])
        if of_supervised is None and of_weight is None:
            continue
        of_scores = _gradient_(scores, labels[chunk], None if weights is None else weights[chunk]).to(weight.dtype)
        if of_supervised is not None:
            torch.mm(of_scores, weight, out=of_supervised[chunk])
        if of_weight is not None:
            _add_product_(of_weight, of_scores.t(), part)
    return _Made(
        losses.new_zeros(targets.shape).index_put_(positions, losses),
        None if of_supervised is None else torch.zeros_like(hidden).index_put_(positions, of_supervised),
        None if of_weight is None else of_weight.to(weight.dtype),
    )


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a x b. In fp32: added up in bfloat16, many chunks would lose what each of them adds."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))


def _cross_entropy_(scores: Tensor, labels: Tensor) -> Tensor:
    """Losses [C] of logits [C, V], which become log-probabilities in place."""
    torch.log_softmax(scores, -1, out=scores)
    return -scores.gather(1, labels[:, None])[:, 0]


def _gradient_(log_probabilities: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Gradient of the losses in the logits [C, V], in place: probability minus one-hot label, weighted."""
    gradient = log_probabilities.exp_()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return gradient if weights is None else gradient.mul_(weights[:, None])
