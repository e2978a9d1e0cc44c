"""One side of `loss_memory`: prints {peak_bytes, seconds} of one forward and backward of the loss.

python loss_sides.py SIDE DTYPE N H V SUPERVISED SEED
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlaunch.distributed.loss_model import chunked_losses
from ftlaunch.recipes.methods.base import IGNORED

CUDA = torch.cuda.is_available()


def idle(hidden: Tensor, head: nn.Linear, targets: Tensor) -> None:
    """Only what every side ends with: the gradients."""
    hidden.grad, head.weight.grad = torch.ones_like(hidden), torch.ones_like(head.weight)


def materialised(hidden: Tensor, head: nn.Linear, targets: Tensor) -> None:
    """The logits of all positions, and cross-entropy on them in fp32, as transformers' models do."""
    F.cross_entropy(
        head(hidden).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    ).backward()


def ftlaunch(hidden: Tensor, head: nn.Linear, targets: Tensor) -> None:
    """Ours."""
    chunked_losses(hidden, head, targets, head.weight.shape[0]).sum().backward()


def linear_cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor) -> None:
    """torch's own (2.13 and later), in chunks of 256 positions."""
    F.linear_cross_entropy(
        hidden.flatten(0, 1),
        head.weight,
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None),
    ).backward()


SIDES: dict[str, Callable[[Tensor, nn.Linear, Tensor], None]] = {
    "idle": idle,
    "materialised": materialised,
    "ftlaunch": ftlaunch,
    "torch linear_cross_entropy": linear_cross_entropy,
}


def peak_bytes() -> int:
    """The most memory this process has held; on Linux's CPU, resident."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def problem(
    positions: int, size: int, vocabulary: int, supervised: float, dtype: str
) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states [1, N, H], a head and targets; the first positions predict nothing."""
    kind = {"device": "cuda" if CUDA else "cpu", "dtype": getattr(torch, dtype)}
    head = nn.Linear(size, vocabulary, bias=False, **kind)
    hidden = torch.randn(1, positions, size, **kind, requires_grad=True)
    targets = torch.randint(vocabulary, (1, positions), device=kind["device"])
    targets[:, : round(positions * (1 - supervised))] = IGNORED
    return hidden, head, targets


def main() -> None:
    side, dtype, *numbers, supervised, seed = sys.argv[1:]
    positions, size, vocabulary = map(int, numbers)
    torch.manual_seed(int(seed))
    SIDES[side](*problem(8, 8, 8, 1.0, dtype))  # what is imported or started at the first call is no part of it
    inputs = problem(positions, size, vocabulary, float(supervised), dtype)
    started = time.perf_counter()
    SIDES[side](*inputs)
    if CUDA:
        torch.cuda.synchronize()
    print(json.dumps({"peak_bytes": peak_bytes(), "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
