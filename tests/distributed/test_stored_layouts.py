"""Models that transformers stores otherwise than it holds them, the experts of a mixture above all: trained from files
as they are published, saved as transformers would save them, gone on with by any other strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes long: once, before the ranks are forked
import pytest
import torch
import transformers.models.mixtral.modeling_mixtral  # noqa: F401  imported before the ranks are forked
from families import make_family, tiny_config
from harness import RanksFailed
from logits import engine_logits, logits
from peft import PeftModel
from safetensors import safe_open
from tiny import make_tokenizer, recipe_for
from training import STRATEGIES, Trained, train
from transformers import AutoModelForCausalLM

LOSS = 1e-5
"""Relative, as for models without experts: no token is so near to two of them that the order of sums decides."""

LOGITS = 1e-5
"""Absolute, of logits around 1: the same weights through the same kernels."""


def recipe(folder: Path, family: str, strategy: str, name: str, steps: int, **more: Any) -> dict[str, Any]:
    train = {"max_steps": steps, "learning_rate": 1e-2, "lr_scheduler": "constant", "eps": 1e-3}
    return recipe_for(
        folder,
        name=f"{family}-{name}",
        model={"path": str(folder / family)},
        strategy=STRATEGIES[strategy],
        train=train,
        evaluate={"at_start": False, "at_end": False},
        **more,
    )


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


def opened(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return logits(model)


def near(run: Trained, expected: Trained) -> bool:
    return all(abs(a / b - 1) < LOSS for a, b in zip(run.losses, expected.losses, strict=True))


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("mixtral", (("fsdp", 2), ("zero3", 3), ("ddp", 2))),
        ("qwen3_moe", (("zero2", 2), ("fsdp", 3))),
        ("gpt_neox", (("zero3", 2), ("fsdp", 2))),
    ],
)
def test_trained_and_gone_on_with_in_other_layouts(tmp_path, family, layouts):
    """One run on one rank; another that changes strategy and world size with every two steps."""
    make_family(tmp_path / family, family)
    steps = 2 * len(layouts)
    expected = train(recipe(tmp_path, family, "ddp", "alone", steps))
    for number, (strategy, size) in enumerate(layouts, 1):
        settings = recipe(tmp_path, family, strategy, "tour", 2 * number)
        run = train(settings, size)
        assert stored_names(run.checkpoint) == stored_names(tmp_path / family)
        plain = opened(run.checkpoint)
        torch.testing.assert_close(engine_logits(settings, run), plain, rtol=0, atol=LOGITS)
    assert near(run, expected), (run.losses, expected.losses)
    for name, value in expected.tensors.items():
        far = (run.tensors[name] - value).abs().max() / value.abs().max()
        assert far < 1e-4, (name, far)  # moments of some numbers are sums that cancel
    assert (plain - opened(tmp_path / family)).abs().max() > 100 * LOGITS, "it has learned something"


def test_an_adapter_on_a_mixture_of_experts(tmp_path):
    make_family(tmp_path / "mixtral", "mixtral")
    settings = recipe(tmp_path, "mixtral", "fsdp", "lora", 2, adapter={"type": "lora", "rank": 4, "alpha": 8})
    run = train(settings, 2)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")
    start = logits(base)
    plain = logits(PeftModel.from_pretrained(base, run.checkpoint))
    assert (plain - start).abs().max() > 100 * LOGITS
    torch.testing.assert_close(engine_logits(settings, run), plain, rtol=0, atol=LOGITS)


def test_missing_experts_are_named_as_the_files_would_name_them(tmp_path):
    from safetensors.torch import load_file, save_file

    make_family(tmp_path / "mixtral", "mixtral")
    [file] = (tmp_path / "mixtral").glob("*.safetensors")
    tensors = load_file(file)
    lost = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RanksFailed, match=f"missing from the files:\n +{lost}\n"):
        train(recipe(tmp_path, "mixtral", "ddp", "short", 1))


def test_learned_buffers_are_found_under_their_stored_names(tmp_path):
    """A correction of the router is called otherwise in files; it would be lost without a word."""
    make_tokenizer(tmp_path / "minimax_m2")
    model = AutoModelForCausalLM.from_config(tiny_config("minimax_m2"))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.arange(5.0))
    model.save_pretrained(tmp_path / "minimax_m2")
    with pytest.raises(RanksFailed, match=r"learned values in buffers(?s:.)*e_score_correction_bias"):
        train(recipe(tmp_path, "minimax_m2", "ddp", "biased", 1))
