"""`LossModel`: losses in chunks are the losses of whole logits, and a model that changes its logits is noticed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families import tiny_config
from one_rank import relative
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import loss_model as loss_models
from ftlaunch.distributed.loss_model import LossModel, chunked_losses
from ftlaunch.distributed.probes import choose_head
from ftlaunch.recipes.methods.base import IGNORED

FP32_TOLERANCE = 1e-6
"""Relative: the same sums, cut at other places."""
BF16_TOLERANCE = 2e-2
"""Relative: gradients of a head are sums of bf16 products, which chunks round to 8 bits (2^-8 = 4e-3) several times."""

HEAD_MODELS = ["granite", "gemma2"]


def random_targets(shape: tuple[int, int], vocabulary: int, share: float = 0.5) -> Tensor:
    targets = torch.randint(vocabulary, shape)
    return torch.where(torch.rand(shape) < share, targets, IGNORED)


def random_batch(vocabulary: int, share: float = 0.5) -> dict[str, Tensor]:
    """Two sequences of 29 tokens; the first is packed from two samples."""
    positions = torch.stack([torch.cat([torch.arange(17), torch.arange(12)]), torch.arange(29)])
    return {
        "input_ids": torch.randint(vocabulary, (2, 29)),
        "position_ids": positions,
        "targets": random_targets((2, 29), vocabulary, share),
    }


def random_model(model_type: str, **changes: Any) -> LossModel:
    torch.manual_seed(3)
    causal_lm = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
    return LossModel(causal_lm, causal_lm)


def gradients(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class CountingHead(nn.Linear):
    """Remembers how many rows each call got."""

    def forward(self, input: Tensor) -> Tensor:
        self.calls = [*getattr(self, "calls", []), len(input)]
        return super().forward(input)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32_TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
@pytest.mark.parametrize("vocabulary", [2, 61, 307])
def test_chunks_change_nothing(vocabulary, dtype, tolerance):
    torch.manual_seed(vocabulary)
    head = CountingHead(24, vocabulary, bias=False, dtype=dtype)
    hidden = torch.randn(3, 19, 24, dtype=dtype, requires_grad=True)
    targets = random_targets((3, 19), vocabulary)
    losses = chunked_losses(hidden, head, targets, vocabulary, logits_bytes=4 * vocabulary * 5)
    supervised = int((targets != IGNORED).sum())
    assert head.calls == [5] * (supervised // 5) + [supervised % 5] * bool(supervised % 5)
    ours = torch.autograd.grad(losses.sum(), [hidden, head.weight])
    logits = F.linear(hidden, head.weight).float()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    theirs = torch.autograd.grad(expected.sum(), [hidden, head.weight])
    assert losses.dtype == torch.float32
    assert relative(losses, expected.view_as(targets)) <= tolerance
    assert torch.equal(losses == 0, targets == IGNORED)
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) <= tolerance


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_in_chunks(monkeypatch, tied):
    """With tied embeddings the head's gradient meets the embedding's."""
    model = random_model("llama", tie_word_embeddings=tied)
    batch = random_batch(307)
    expected = model(batch, "own_losses")
    theirs = gradients(model, expected)
    monkeypatch.setattr(loss_models, "chunked_losses", partial(chunked_losses, logits_bytes=4 * 307 * 7))
    losses = model(batch)
    assert relative(losses, expected) <= FP32_TOLERANCE
    ours = gradients(model, losses)
    assert ours.keys() == theirs.keys() and ("model.lm_head.weight" in ours) != tied
    for name in ours:
        assert relative(ours[name], theirs[name]) <= 1e-5, name


def test_nothing_supervised():
    """Padding goes through the model like everything else (every rank has the same number of micro-batches) and adds
    nothing: the loss and all gradients are exactly zero, and there."""
    model = random_model("llama")
    losses = model(random_batch(307, share=0.0))
    assert torch.equal(losses, torch.zeros(2, 29))
    ours = gradients(model, losses)
    assert len(ours) == len(list(model.parameters()))
    assert all(not gradient.any() for gradient in ours.values())


@pytest.mark.parametrize("model_type", HEAD_MODELS)
def test_logits_changed_after_the_head_are_noticed(group, model_type):
    """Gemma 2 caps them, Granite divides them; the probe says so, and then the losses are the model's own. A random
    model's logits are far below the cap, which must be noticed all the same."""
    model = random_model(model_type)
    batch = random_batch(307, share=1.0)
    note = choose_head(model, model, group, 307, "float32")
    assert note is not None and "its own head is used" in note
    labels = batch["targets"]
    # Without a cache, because transformers sees that positions restart only then.
    own = model.causal_lm(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    expected = F.cross_entropy(own.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    assert relative(model(batch), expected) <= FP32_TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt_neox", "mistral"])
def test_plain_heads_are_used_in_chunks(group, model_type):
    model = random_model(model_type)
    assert choose_head(model, model, group, 307, "float32") is None
    assert not model.use_own_head
    batch = random_batch(307)
    assert relative(model(batch), model(batch, "own_losses")) <= FP32_TOLERANCE


def test_a_plain_head_in_bfloat16(group):
    model = random_model("llama").to(torch.bfloat16)
    assert choose_head(model, model, group, 307, "bfloat16") is None
