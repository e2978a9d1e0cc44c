"""Where samples start reaches the attention of real models. The kernels need a GPU (tests/gpu), so a plain computation
stands in for them here: each sample by itself."""

from __future__ import annotations

import pytest
import torch
from families import tiny_config
from one_rank import relative
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import varlen
from ftlaunch.distributed.batch import on_device
from ftlaunch.distributed.loss_model import LossModel
from ftlaunch.distributed.probes import choose_attention
from ftlaunch.recipes.methods.base import RowId, Sample
from ftlaunch.recipes.methods.causal import lay_out

TOLERANCE = 1e-5
"""Relative, float32: the same pairs of positions, added in another order."""

SERVED = ["llama", "qwen3", "olmo2", "mistral", "phi3", "gpt_neox"]


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _: Tensor, longest: int, __: int, **more: object
) -> Tensor:
    """What `varlen_attn` computes, on any device."""
    assert more["window_size"] == (-1, 0) and starts.dtype == torch.int32
    lengths = starts.diff().tolist()
    assert sum(lengths) == len(query) and max(lengths) <= longest
    cuts = zip(*(part.transpose(0, 1).split(lengths, dim=1) for part in (query, key, value)), strict=True)
    attended = [
        scaled_dot_product_attention(*one, is_causal=True, scale=more["scale"], enable_gqa=True) for one in cuts
    ]
    return torch.cat(attended, dim=1).transpose(0, 1)


@pytest.fixture(autouse=True)
def _serves_here(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", one_by_one)
    real = varlen.may_serve
    monkeypatch.setattr(varlen, "may_serve", lambda causal_lm, _device, length: real(causal_lm, "cuda:0", length))


def random_model(model_type: str) -> LossModel:
    torch.manual_seed(11)
    config = tiny_config(model_type, hidden_size=64, head_dim=16)
    if model_type == "mistral":
        config.sliding_window = 64
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return LossModel(causal_lm, causal_lm)


def packed_batch() -> dict[str, Tensor]:
    torch.manual_seed(5)
    samples = [
        Sample(torch.randint(307, (length,)).int().numpy(), (torch.rand(length) < 0.6).numpy(), RowId("a", "b", 0, 0))
        for length in (13, 30, 7, 50)
    ]
    return on_device(lay_out([samples[:3], samples[3:], []], 64), "cpu")


def test_where_samples_start():
    assert packed_batch()["sample_starts"].tolist() == [0, 13, 43, 50, 64, 128, 192]


@pytest.mark.parametrize("model_type", SERVED)
def test_losses_and_gradients_are_those_of_sdpa(group, model_type):
    model, batch = random_model(model_type), packed_batch()
    expected = model(batch)
    expected.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert choose_attention(model, model, group, 64) is None
    assert model.knows_samples
    found = model.train()(batch)
    found.sum().backward()
    assert relative(found, expected) <= TOLERANCE
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[name]) <= TOLERANCE, name


def test_starts_that_a_model_loses_on_the_way_are_noticed(group, monkeypatch):
    model, real = random_model("llama"), varlen.varlen_attention

    def forgetful(*tensors, cu_seq_lens_q=None, **more):
        return real(*tensors, **more)

    monkeypatch.setattr(varlen, "varlen_attention", forgetful)
    assert "sdpa with masks" in choose_attention(model, model, group, 64)
    assert not model.knows_samples and model.causal_lm.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["gemma2", "bloom", "gpt2"])
def test_models_that_need_more_than_it_computes_keep_sdpa(group, model_type):
    """Gemma 2 caps its scores, BLOOM adds a bias to them, GPT-2 drops some out while it trains."""
    model = random_model(model_type)
    choose_attention(model, model, group, 32)
    assert not model.knows_samples


def test_a_window_that_sequences_outgrow_is_left_to_sdpa():
    causal_lm = random_model("mistral").causal_lm
    causal_lm.config.sliding_window = 16
    assert varlen.may_serve(causal_lm, "cuda:0", 16)
    assert not varlen.may_serve(causal_lm, "cuda:0", 17)
