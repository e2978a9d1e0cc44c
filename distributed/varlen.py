"""Attention within packed samples on CUDA, by the variable-length flash attention that ships with torch.

Under sdpa a mask over all pairs of positions keeps packed samples apart, so a sequence of S tokens costs S x S pairs
however short its samples are. Variable-length attention (Dao 2023, FlashAttention-2, arXiv:2307.08691) is told where
samples start and visits the pairs within them only.

Shapes: B sequences, S tokens in a sequence, H heads, K heads of keys and values, D size of a head, N samples.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "ftlaunch_varlen"
"""What transformers calls it."""

HEAD_SIZES = range(8, 257, 8)
"""That the kernels have."""

# torch 2.12 asks for what 2.11 does unasked: fewer heads of keys and values than of queries.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

_UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions that change what is computed, and that the kernels do not know."""


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within samples, as transformers calls its attention functions.

    `query` [B, H, S, D], `key` and `value` [B, K, S, D], `cu_seq_lens_q` [N + 1] int32: where the samples of the batch
    start when its sequences lie end to end, and the end; None: every sequence is one sample. Returns [B, S, H, D].
    Raises ValueError for what the kernels cannot compute.
    """
    wanted = {
        **{name: others.get(name) is not None for name in _UNKNOWN},
        "dropout": dropout > 0,
        "a mask": attention_mask is not None,
        "values of another size": query.shape[-1] != value.shape[-1],
    }
    if any(wanted.values()):
        missing = ", ".join(name for name, is_wanted in wanted.items() if is_wanted)
        raise ValueError(f"{type(module).__name__} needs {missing}")
    batch, _, length, _ = query.shape
    starts = cu_seq_lens_q
    if starts is None:
        starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    # The length of a sequence bounds that of a sample, and is known without asking the device.
    attended = varlen_attn(
        query, key, value, starts, starts, length, length, scale=scaling, window_size=(-1, 0), **_GROUPED
    )
    return attended.unflatten(0, (batch, length)), None  # type: ignore[union-attr]


def _no_mask(*_arguments: Any, **_named: Any) -> None:
    """The starts of samples say it all: rows are padded behind their last sample, which causal attention hides."""


def register() -> None:
    """Make it known to transformers."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def may_serve(causal_lm: Any, device: str, sequence_length: int) -> bool:
    """Whether it is worth a try for this model in bfloat16 (`probes.choose_attention` tries): on CUDA, with heads of a
    size that the kernels have, and no window that the sequence outgrows."""
    config = causal_lm.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    windows = [getattr(config, name, None) or sequence_length for name in ("sliding_window", "attention_chunk_size")]
    return (
        device.startswith("cuda")
        and causal_lm._supports_flash_attn
        and size in HEAD_SIZES
        and min(windows) >= sequence_length
    )
