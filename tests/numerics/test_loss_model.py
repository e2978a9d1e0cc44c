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

from ftlaunch.distributed import linear_loss
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


UPSTREAM = {
    "summed": lambda losses: losses.sum() / 7,
    "per sequence": lambda losses: (losses.sum(-1) * torch.tensor([1.0, -2.0, 0.5])).sum(),
    "per position": lambda losses: (losses * torch.linspace(-1, 1, losses.numel()).view_as(losses)).sum(),
}
"""What becomes of the losses of a batch."""


def whole_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none").view_as(targets)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32_TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("use", UPSTREAM)
@pytest.mark.parametrize("trained", ["both", "hidden", "head"])
def test_a_plain_head_is_differentiated_with_its_loss(dtype, tolerance, rows, use, trained):
    torch.manual_seed(rows)
    head = nn.Linear(24, 61, bias=False, dtype=dtype).requires_grad_(trained != "hidden")
    hidden = torch.randn(3, 19, 24, dtype=dtype, requires_grad=trained != "head")
    targets = random_targets((3, 19), 61)
    wanted = [tensor for tensor in (hidden, head.weight) if tensor.requires_grad]
    losses = chunked_losses(hidden, head, targets, 61, logits_bytes=4 * 61 * rows)
    expected = whole_losses(hidden, head.weight, targets)
    assert losses.dtype == torch.float32
    assert relative(losses, expected) <= tolerance
    assert torch.equal(losses == 0, targets == IGNORED)
    ours = torch.autograd.grad(UPSTREAM[use](losses), wanted)
    theirs = torch.autograd.grad(UPSTREAM[use](expected), wanted)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        assert relative(one, other) <= tolerance


@pytest.mark.parametrize("rows", [1, 8])
def test_many_chunks_lose_nothing_of_a_heads_gradient(rows):
    """In bfloat16 a long sum stands still once its parts are below its rounding: 400 positions of one token are one."""
    torch.manual_seed(0)
    hidden = (1 + 0.1 * torch.randn(1, 400, 16)).bfloat16()
    targets = torch.full((1, 400), 3)
    head = nn.Linear(16, 33, bias=False, dtype=torch.bfloat16)
    found = torch.autograd.grad(chunked_losses(hidden, head, targets, 33, rows * 4 * 33).sum(), head.weight)[0]
    whole = head.weight.detach().float().requires_grad_()
    losses = F.cross_entropy(F.linear(hidden.float(), whole)[0], targets[0], reduction="sum")
    expected = torch.autograd.grad(losses, whole)[0]
    assert relative(found, expected) <= 2**-8


def test_a_summed_loss_makes_no_logits_in_backward(monkeypatch):
    """That is where the time goes; gradients that were handed out once are made again for who asks twice."""
    head, hidden = nn.Linear(24, 61, bias=False), torch.randn(3, 19, 24, requires_grad=True)
    targets = random_targets((3, 19), 61)
    passes = []
    in_chunks = linear_loss._in_chunks
    monkeypatch.setattr(linear_loss, "_in_chunks", lambda *args: passes.append(len(args)) or in_chunks(*args))
    total = chunked_losses(hidden, head, targets, 61).sum() / 3
    first = [g.clone() for g in torch.autograd.grad(total, [hidden, head.weight], retain_graph=True)]
    assert len(passes) == 1
    second = torch.autograd.grad(total, [hidden, head.weight])
    assert len(passes) == 2
    for one, other in zip(first, second, strict=True):
        assert relative(one, other) <= FP32_TOLERANCE


def test_a_plain_head_without_gradients():
    head, hidden = nn.Linear(24, 61, bias=False), torch.randn(3, 19, 24, requires_grad=True)
    targets = random_targets((3, 19), 61)
    with torch.no_grad():
        losses = chunked_losses(hidden, head, targets, 61, logits_bytes=4 * 61 * 5)
    assert not losses.requires_grad
    assert relative(losses, whole_losses(hidden, head.weight, targets)) <= FP32_TOLERANCE


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


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
def test_positions_that_are_left_out_count_through(model_type):
    """Bit for bit: batches without packed samples go to the model without positions."""
    model = random_model(model_type)
    batch = random_batch(307) | {"position_ids": torch.arange(29).expand(2, -1)}
    expected = model(batch)
    theirs = gradients(model, expected)
    del batch["position_ids"]
    losses = model(batch)
    assert torch.equal(losses, expected)
    ours = gradients(model, losses)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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
