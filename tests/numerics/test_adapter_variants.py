"""LoRA's variants against peft itself, trained by a plain loop on the same micro-batches in the same order.

peft starts PiSSA and OLoRA by changing the base; ours leave it alone and subtract the start. Both must be the same
function with the same gradients, step after step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import Rank, read_steps
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import recipe_for
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ftlaunch.distributed.adapter import lora_layers
from ftlaunch.distributed.data.stream import StepBatches
from ftlaunch.recipes.methods.base import IGNORED

TOLERANCE = 1e-5
"""Relative, of a loss or a norm in fp32: sums of some hundred terms in another order are good to about 1e-7."""

LATER = 2e-4
"""The same after some steps: AdamW turns rounding of gradients near zero into changes of weights."""

STEPS = 4
RATE = 1e-3
RANK, ALPHA = 5, 8.0

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # our keys; peft's
    "kaiming": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "gaussian": ({"init": "gaussian"}, {}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "pissa_rslora": ({"init": "pissa", "use_rslora": True}, {"init_lora_weights": "pissa", "use_rslora": True}),
    "olora": ({"init": "olora"}, {"init_lora_weights": "olora"}),
    "olora_dora": ({"init": "olora", "use_dora": True}, {"init_lora_weights": "olora", "use_dora": True}),
}


def recipe(folder: Path, **adapter: Any) -> dict[str, Any]:
    return recipe_for(
        folder,
        # transformers sees packed samples in batches of one sequence only, and without a cache.
        train={"max_steps": STEPS, "micro_batch_size": 1, "learning_rate": RATE, "max_grad_norm": 0.05},
        adapter={"type": "lora", "rank": RANK, "alpha": ALPHA, **adapter},
    )


def peft_model(path: str, start: dict[str, Tensor], **changes: Any) -> PeftModel:
    """peft's own; where it draws, it starts from our draw."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
    model = get_peft_model(base, config)
    if "init_lora_weights" not in changes:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(start[name])
    return model


def plain_step(model: PeftModel, optimizer: torch.optim.Optimizer, step: StepBatches) -> tuple[float, float]:
    """Loss and norm of one global batch: one sum over one count."""
    weight = sum(int((micro.batch.targets != IGNORED).sum()) for micro in step.micro_batches)
    total = 0.0
    for micro in step.micro_batches:
        ids, positions, targets = map(
            torch.from_numpy, (micro.batch.input_ids, micro.batch.position_ids, micro.batch.targets)
        )
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / weight).backward()
        total += float(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.05)
    optimizer.step()
    optimizer.zero_grad()
    return total / weight, float(norm)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_learns_the_same(tmp_path, group, variant):
    ours, theirs = VARIANTS[variant]
    settings = recipe(tmp_path, **ours)
    steps = read_steps(settings, group, STEPS)
    rank = Rank.build(settings)
    rank.engine.set_learning_rate(RATE)
    start = {name.removeprefix("model."): p.detach().clone() for name, p in rank.engine.module.named_parameters()}
    model = peft_model(settings["model"]["path"], start, **theirs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for number, step in enumerate(steps):
        tolerance = LATER if number else TOLERANCE
        loss, norm = rank.accumulate(step), rank.engine.step()
        their_loss, their_norm = plain_step(model, optimizer, step)
        assert loss == pytest.approx(their_loss, rel=tolerance), number
        assert norm == pytest.approx(their_norm, rel=tolerance), number
        assert norm > 0.05, "there is something to clip"
    changed = [
        float((p.detach() - start[name.removeprefix("model.")]).abs().max())
        for name, p in rank.engine.module.named_parameters()
        if p.requires_grad
    ]
    assert min(changed) > 0.0


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_the_start_is_a_part_of_the_weights_and_changes_nothing(tmp_path, group, init):
    """The product is the best approximation of that rank, or what peft takes for it; the model says what it said."""
    settings = recipe(tmp_path, init=init)
    [step] = read_steps(settings, group, 1)
    rank = Rank.build(settings)
    plain = recipe_for(tmp_path)
    assert rank.accumulate(step) == pytest.approx(Rank.build(plain).accumulate(step), rel=TOLERANCE)
    whole = dict(AutoModelForCausalLM.from_pretrained(plain["model"]["path"]).named_parameters())
    for name, layer in lora_layers(rank.engine.module):
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        assert torch.equal(a[:RANK], a[RANK:]) and torch.equal(b[:, :RANK], -b[:, RANK:])
        principal = layer.scaling["default"] * b[:, :RANK] @ a[:RANK]
        weight = whole[name.removeprefix("model.base_model.model.") + ".weight"].detach()
        if init == "olora":
            principal = principal / layer.scaling["default"]
            q, r = torch.linalg.qr(weight)
            expected = q[:, :RANK] @ r[:RANK]
        else:
            u, s, v = torch.linalg.svd(weight)
            expected = u[:, :RANK] * s[:RANK] @ v[:RANK]
        # Subspace iteration is judged by what it leaves, since close singular values swap their vectors.
        if init == "pissa_niter_16":
            assert (weight - principal).norm() <= 1.001 * (weight - expected).norm(), name
        else:
            torch.testing.assert_close(principal, expected, rtol=0, atol=1e-5 * float(weight.abs().max()), msg=name)


def test_lengths_are_those_of_the_weights_rows(tmp_path, group):
    rank = Rank.build(recipe(tmp_path, use_dora=True))
    for name, layer in lora_layers(rank.engine.module):
        expected = layer.get_base_layer().weight.detach().norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), expected, rtol=1e-6, atol=0)
        assert expected.min() > 0, name
