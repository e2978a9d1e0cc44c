"""Packed samples never see each other, or packing is refused."""

from __future__ import annotations

import pytest
import torch
from families import tiny_config
from one_rank import relative
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ftlaunch.distributed.loss_model import LossModel
from ftlaunch.distributed.probes import check_packing
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.base import IGNORED, RowId, Sample
from ftlaunch.recipes.methods.causal import lay_out

PACKABLE = ["llama", "mistral", "qwen3", "gemma3_text", "phi3", "gpt_neox", "olmo2"]
NOT_PACKABLE = ["bloom", "mamba2", "falcon_h1", "lfm2"]

LOSS_TOLERANCE = 1e-6
"""Relative: masked positions add exact zeros, only the order of sums differs."""
GRADIENT_TOLERANCE = 1e-5
"""Relative: sums over three sequences, in another order."""


def random_model(model_type: str) -> LossModel:
    torch.manual_seed(11)
    causal_lm = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    return LossModel(causal_lm, causal_lm)


def random_sample(length: int) -> Sample:
    supervised = torch.rand(length) < 0.6
    return Sample(torch.randint(307, (length,)).int().numpy(), supervised.numpy(), RowId("a", "b", 0, 0))


@pytest.mark.parametrize("model_type", PACKABLE)
def test_models_that_can_pack(group, model_type):
    check_packing(random_model(model_type), group, 307, model_type)


@pytest.mark.parametrize("model_type", NOT_PACKABLE)
def test_models_that_cannot(group, model_type):
    with pytest.raises(UserError, match=f"{model_type}.*packing: false"):
        check_packing(random_model(model_type), group, 307, model_type)


def test_attention_that_forgets_packing_in_larger_batches_is_found(group):
    """As transformers' flash attention does: packing is read from position ids in batches of one sequence only."""

    def forgetful(module, query, key, value, attention_mask, **more):
        mask = attention_mask if query.shape[0] == 1 else None
        more["is_causal"] = mask is None
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **more)

    AttentionInterface.register("forgetful", forgetful)
    AttentionMaskInterface.register("forgetful", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = random_model("llama")
    model.causal_lm.set_attn_implementation("forgetful")
    check_packing(model, group, 307, "llama", micro_batch_size=1)
    with pytest.raises(UserError, match=r"micro_batch_size: 1"):
        check_packing(model, group, 307, "llama", micro_batch_size=4)


@pytest.mark.parametrize("model_type", PACKABLE)
def test_packed_samples_have_the_losses_and_gradients_of_separate_ones(model_type):
    torch.manual_seed(5)
    samples = [random_sample(length) for length in (13, 30, 7)]
    model = random_model(model_type)
    packed = as_tensors(lay_out([samples], 64))
    losses = model(packed)
    losses.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(as_tensors(lay_out([[sample]], len(sample)))) for sample in samples]
    sum(one.sum() for one in alone).backward()
    expected = torch.cat([*alone, torch.zeros(1, 14)], dim=1)
    assert relative(losses, expected) <= LOSS_TOLERANCE
    assert torch.equal(losses != 0, packed["targets"] != IGNORED)
    for name, parameter in model.named_parameters():
        assert relative(ours[name], parameter.grad) <= GRADIENT_TOLERANCE, name


def as_tensors(batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(getattr(batch, name)) for name in ("input_ids", "position_ids", "targets")}
