"""torch's variable-length attention on packed samples: the numbers of separate samples, and no other model touched."""

from __future__ import annotations

import pytest
import torch
from families import tiny_config
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import varlen
from ftlaunch.distributed.loss_model import LossModel
from ftlaunch.distributed.probes import check_packing, choose_attention

TOLERANCE = 2e-2
"""Relative to the largest value. bfloat16 rounds to 2^-8, and the reference is computed in float32."""

LENGTHS = [(37, 1, 90), (128,), (64, 64), (5, 100, 3, 20)]
S = 128


def heads(number: int, size: int) -> Tensor:
    return torch.randn(len(LENGTHS), number, S, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def separately(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each sample by itself, in float32: [B, S, H, D]."""
    rows = []
    for b, lengths in enumerate(LENGTHS):
        cuts = [part.split(lengths, dim=1) for part in (query[b].float(), key[b].float(), value[b].float())]
        attended = [attention(*one, is_causal=True, enable_gqa=True) for one in zip(*cuts, strict=True)]
        rows.append(torch.cat(attended, dim=1).transpose(0, 1))
    return torch.stack(rows)


def close(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max()) <= TOLERANCE


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_attention_and_gradients_are_those_of_separate_samples(kv_heads, size):
    torch.manual_seed(0)
    query, key, value = heads(8, size), heads(kv_heads, size), heads(kv_heads, size)
    lengths = torch.tensor([0, *(length for row in LENGTHS for length in row)])
    starts = lengths.cumsum(0).to("cuda", torch.int32)
    found, _ = varlen.varlen_attention(nn.Identity(), query, key, value, None, cu_seq_lens_q=starts)
    expected = separately(query, key, value)
    assert close(found, expected)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(found, (query, key, value), upstream.bfloat16())
    theirs = torch.autograd.grad(expected, (query, key, value), upstream)
    assert all(close(one, other) for one, other in zip(ours, theirs, strict=True))


def on_gpu(model_type: str) -> LossModel:
    torch.manual_seed(11)
    config = tiny_config(model_type, hidden_size=64, head_dim=16)
    if model_type == "mistral":
        config.sliding_window = 64
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
    return LossModel(causal_lm, causal_lm)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2", "mistral", "phi3"])
def test_it_serves_models_of_plain_attention(cuda_group, model_type):
    model = on_gpu(model_type)
    assert choose_attention(model, model, cuda_group, 64) is None
    assert model.knows_samples and model.causal_lm.config._attn_implementation == varlen.NAME
    check_packing(model, cuda_group, 307, model_type, micro_batch_size=2)


def test_a_model_that_it_computes_otherwise_stays_with_sdpa(cuda_group, monkeypatch):
    """As one whose kernels saw other samples would: here the starts are lost on the way."""
    model = on_gpu("llama")
    real = varlen.varlen_attention

    def forgetful(*tensors, cu_seq_lens_q=None, **more):
        return real(*tensors, **more)

    monkeypatch.setattr(varlen, "varlen_attention", forgetful)
    note = choose_attention(model, model, cuda_group, 32)
    assert "sdpa with masks" in note
    assert not model.knows_samples and model.causal_lm.config._attn_implementation == "sdpa"
    check_packing(model, cuda_group, 307, "llama", micro_batch_size=2)


def test_a_window_that_sequences_outgrow_is_left_to_sdpa(cuda_group):
    model = on_gpu("mistral")
    model.causal_lm.config.sliding_window = 16
    assert choose_attention(model, model, cuda_group, 17) is None
    assert not model.knows_samples
