"""Models that are drawn rather than read: every tensor is set, by the model's own rules, and to the same numbers
whoever draws."""

from __future__ import annotations

import copy

import pytest
import torch
from families import random_recipe, tiny_config
from one_rank import Rank
from torch import nn
from transformers import AutoModelForCausalLM

from ftlaunch.distributed.initialise import drawn_from, fill_buffers, fill_random_model, keyed_seed
from ftlaunch.distributed.loss_model import LossModel
from ftlaunch.recipes.errors import UserError

FAMILIES = ["llama", "mistral", "qwen3", "phi3", "olmo2", "gpt_neox", "granite", "gemma2", "gemma3_text"]


def real_model(model_type: str) -> nn.Module:
    """As transformers makes it, without ever being on meta."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that is not written to is full of NaN, as real memory may be."""
    to_empty = nn.Module.to_empty

    def poisoned(module: nn.Module, **arguments: object) -> nn.Module:
        emptied = to_empty(module, **arguments)
        with torch.no_grad():
            for tensor in [*emptied.parameters(), *emptied.buffers()]:
                tensor.fill_(torch.nan if tensor.is_floating_point() else -77)
        return emptied

    monkeypatch.setattr(nn.Module, "to_empty", poisoned)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_random_models(tmp_path, group, poisoned_memory, model_type):
    """Every parameter and buffer is set; constants and buffers are equal to transformers' own, drawn tensors have
    their spread. The spread of n normal draws is known to 1 / sqrt(2n), so 6 of these never happen by chance."""
    weights = Rank.build(random_recipe(tmp_path, model_type)).weights()
    expected = dict(real_model(model_type).named_parameters())
    assert weights.keys() == expected.keys()
    for name, ours in weights.items():
        assert torch.isfinite(ours).all(), name
        spread = float(expected[name].detach().std())
        if spread == 0.0:
            assert torch.equal(ours, expected[name]), name
            continue
        error = 6 / (2 * ours.numel()) ** 0.5
        assert float(ours.std()) == pytest.approx(spread, rel=2 * error), name
        assert abs(float(ours.mean())) <= 6 * spread / ours.numel() ** 0.5, name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_buffers(tmp_path, group, poisoned_memory, model_type):
    """Rotary frequencies and embedding scales are in no checkpoint; after meta they must come back bit for bit."""
    rank = Rank.build(random_recipe(tmp_path, model_type))
    ours = dict(rank.built.loss_model.causal_lm.named_buffers())
    expected = dict(real_model(model_type).named_buffers())
    assert ours.keys() == expected.keys()
    for name, there in expected.items():
        assert ours[name].dtype == there.dtype and torch.equal(ours[name], there), name


ROPE = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("rope_type", ROPE)
def test_scaled_rotary_frequencies(tmp_path, group, rope_type):
    """Long-context models scale them, Llama 3.1 among them."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE[rope_type]}
    recipe = random_recipe(tmp_path, "llama")
    config = tiny_config("llama", rope_parameters=rope)
    config.save_pretrained(recipe["model"]["path"])
    ours = dict(Rank.build(recipe).built.loss_model.causal_lm.named_buffers())
    expected = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    plain = dict(real_model("llama").named_buffers())
    assert ours.keys() == expected.keys()
    for name, there in expected.items():
        assert torch.equal(ours[name], there), name
        assert not torch.equal(there, plain[name]), name


def test_tensors_of_one_shape_differ(tmp_path, group):
    weights = Rank.build(random_recipe(tmp_path, "llama")).weights()
    first, second = (weights[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_a_seed_is_a_model(tmp_path, group):
    """The same seed draws the same numbers whatever was drawn before; another seed draws others."""
    first = Rank.build(random_recipe(tmp_path, "llama")).weights()
    torch.rand(5)
    again = Rank.build(random_recipe(tmp_path, "llama")).weights()
    other = Rank.build(random_recipe(tmp_path, "llama", train={"seed": 1})).weights()
    for name, values in first.items():
        assert torch.equal(values, again[name]), name
        assert torch.equal(values, other[name]) == (values.std() == 0), name


class Unknown(nn.Module):
    """A buffer that no initialisation of transformers knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0), persistent=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_buffer_that_cannot_be_rebuilt_is_refused(dtype):
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(tiny_config("llama"))
        causal_lm.unknown = Unknown()
        causal_lm.unknown.table = causal_lm.unknown.table.to(dtype)
    with pytest.raises(UserError, match=r"Unknown\.table cannot be rebuilt"):
        fill_buffers(LossModel(causal_lm, causal_lm), torch.device("cpu"))


def test_a_parameter_that_nothing_draws_is_refused():
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(tiny_config("llama"))
        causal_lm.unknown = nn.Module()
        causal_lm.unknown.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=r"Module\.scale cannot be rebuilt"):
        fill_random_model(LossModel(causal_lm, causal_lm), 0, lambda _parameter, _whole: None)


def test_drawing_leaves_the_generator_outside_alone():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with drawn_from(99):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with drawn_from(99):
        assert torch.equal(torch.rand(3), inside)


def test_keys_are_told_apart():
    """Also where their texts join to the same one; and the numbers never change, because runs are continued by them."""
    assert keyed_seed(1, "a", 23) != keyed_seed(1, "a2", 3)
    assert keyed_seed(0, "model.embed_tokens.") == 8806076622860939913
    assert all(0 <= keyed_seed(number) < 2**63 for number in range(100))


def test_real_models_are_not_changed_by_looking(tmp_path, group):
    """Drawing a module's twin leaves the module itself as it was."""
    model = real_model("llama")
    before = copy.deepcopy(model.state_dict())
    fill_buffers(LossModel(model, model), torch.device("cpu"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
