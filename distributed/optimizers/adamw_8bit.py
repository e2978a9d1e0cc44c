"""AdamW with moments of 8 bits in blocks of 256 (Dettmers et al. 2021, arXiv:2110.02861), through bitsandbytes.

A block is a run of 256 elements of a rank's shard, so another layout rounds moments otherwise. Tensors of fewer than
4,096 elements on a rank keep 32 bits. Checkpoints hold the moments in fp32, as those of `adamw`; the same shards get
the very same 8 bits back, since the scale of a block is its largest element, which is stored exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...recipes.errors import UserError
from ...recipes.schema import Train
from .adamw import AdamW

BLOCK = 256

NUMBERED = {"exp_avg": "1", "exp_avg_sq": "2"}
"""bitsandbytes numbers its states."""


class AdamW8bit(AdamW):
    """`ShardOptimizer`."""

    def _make(self, groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
        try:
            from bitsandbytes.optim import adamw as library
        except ImportError as error:
            raise UserError(
                f"train.optimizer: adamw_8bit needs bitsandbytes, which cannot be imported here ({error}): "
                "pip install 'ftlaunch[quantized]'. adamw and adafactor need nothing more."
            ) from error
        make: Any = library.AdamW8bit
        optimizer: torch.optim.Optimizer = make(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps)
        return optimizer

    def _create_state(self) -> None:
        for group_index, group in enumerate(self._optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                self._optimizer.init_state(group, parameter, group_index, index)  # type: ignore[attr-defined]

    def _set_steps(self, state: dict[str, Any], steps: int) -> None:
        state["step"] = steps

    def read(self, part: str, name: str) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        state, number = self._state(name), NUMBERED[part]
        held: Tensor = state[f"state{number}"]
        if held.dtype == torch.float32:
            return held
        scales, code = state[f"absmax{number}"], state[f"qmap{number}"]
        values: Tensor = dequantize_blockwise(held, absmax=scales, code=code, blocksize=BLOCK)
        if code[0] < 0:
            # The lowest code stands for -0.993, so a negative largest element would be lost, and the scale with it.
            largest = scales.repeat_interleave(BLOCK)[: held.numel()].view(held.shape)
            values = torch.where(held == 0, -largest, values)
        return values

    def write(self, part: str, name: str, values: Tensor) -> None:
        state, number = self._state(name), NUMBERED[part]
        held: Tensor = state[f"state{number}"]
        values = values.view(held.shape).to(held.device)
        if held.dtype == torch.float32:
            held.copy_(values)
            return
        codes, scales = _quantized(values.flatten(), state[f"qmap{number}"])
        held.copy_(codes.view(held.shape))
        state[f"absmax{number}"].copy_(scales)


def _quantized(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, and the scale of each block. bitsandbytes' own is a quick search on a CPU, which misses by one
    now and then."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    scaled = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    return codes.flatten()[: len(values)].to(torch.uint8), scales
