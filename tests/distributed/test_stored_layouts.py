"""Models that transformers stores otherwise than it holds them, the experts of a mixture above all, and models whose
files hold more than parameters: trained from files as they are published, saved as transformers would save them, gone
on with by any other strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes long: once, before the ranks are forked
import pytest
import torch
import transformers.models.mixtral.modeling_mixtral  # noqa: F401  imported before the ranks are forked
from families import make_config_folder, make_family
from harness import RanksFailed
from logits import engine_logits, logits
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import recipe_for
from training import STRATEGIES, Trained, train
from transformers import AutoModelForCausalLM

from ftlaunch.launcher import cli

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
        checkpoint={"path": str(folder / "runs"), "every_steps": 1, "keep_last": 2},
        **more,
    )


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


def buffers(folder: Path) -> dict[str, torch.Tensor]:
    """Stored tensors that are no parameters: of these families those that no gradient reaches."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    kinds = ("e_score_correction_bias", "layer_scalar")
    return {name: value for file in files for name, value in file.items() if name.endswith(kinds)}


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[n].dtype == v.dtype and one[n].equal(v) for n, v in other.items())


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
        ("minimax_m2", (("zero3", 3), ("fsdp", 2))),
        ("gemma4_text", (("zero3", 2), ("hybrid", 3))),
        pytest.param("glm4_moe", (("zero2", 2), ("zero3", 4), ("ddp", 3)), marks=pytest.mark.evidence),
        pytest.param("deepseek_v3", (("fsdp", 4), ("zero3-offload", 3), ("zero1", 2)), marks=pytest.mark.evidence),
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
        assert is_same(buffers(run.checkpoint), buffers(tmp_path / family))
        plain = opened(run.checkpoint)
        torch.testing.assert_close(engine_logits(settings, run), plain, rtol=0, atol=LOGITS)
    assert near(run, expected), (run.losses, expected.losses)
    for name, value in expected.tensors.items():
        largest = value.abs().max().clamp_min(1e-30)  # an expert that was never chosen has no moments
        far = (run.tensors[name] - value).abs().max() / largest
        assert far < 1e-4, (name, far)  # moments of some numbers are sums that cancel
    assert (plain - opened(tmp_path / family)).abs().max() > 100 * LOGITS, "it has learned something"


@pytest.mark.parametrize(
    ("family", "changes"),
    [("minimax_m2", {}), ("glm4_moe", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["gate"]})],
)
def test_an_adapter_on_a_mixture_of_experts(tmp_path, family, changes):
    """What the files hold beside parameters is the base's, of a router too that is trained whole."""
    make_family(tmp_path / family, family)
    settings = recipe(tmp_path, family, "fsdp", "lora", 2, adapter={"type": "lora", "rank": 4, "alpha": 8, **changes})
    run = train(settings, 2)
    held, kept = buffers(run.checkpoint), buffers(tmp_path / family)
    copied = {name: value for name, value in kept.items() if changes}  # peft wants them beside the router's weights
    assert kept and is_same({name.removeprefix("base_model.model."): value for name, value in held.items()}, copied)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    start = logits(base)
    plain = logits(PeftModel.from_pretrained(base, run.checkpoint))
    assert (plain - start).abs().max() > 100 * LOGITS
    torch.testing.assert_close(engine_logits(settings, run), plain, rtol=0, atol=LOGITS)
    assert cli.main(["verify", str(run.checkpoint)]) == 0


def test_missing_experts_are_named_as_the_files_would_name_them(tmp_path):
    make_family(tmp_path / "mixtral", "mixtral")
    [file] = (tmp_path / "mixtral").glob("*.safetensors")
    tensors = load_file(file)
    lost = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RanksFailed, match=f"missing from the files:\n +{lost}\n"):
        train(recipe(tmp_path, "mixtral", "ddp", "short", 1))


def test_buffers_are_written_once_and_go_with_an_export(tmp_path, capsys):
    """In a file of their own, of which later checkpoints have a hard link. A correction of a router stays in fp32, as
    transformers has it, whatever the weights are cast to."""
    make_family(tmp_path / "glm4_moe", "glm4_moe")
    settings = recipe(tmp_path, "glm4_moe", "zero3", "half", 2)
    settings["model"]["dtype"] = "bfloat16"
    run = train(settings, 2)
    kept = buffers(tmp_path / "glm4_moe")
    assert {value.dtype for value in kept.values()} == {torch.float32} and all(value.any() for value in kept.values())
    files = [max(place.glob("model-*.safetensors")) for place in run.directory.glob("step-*")]
    assert len(files) == 2 and len({file.stat().st_ino for file in files}) == 1
    assert load_file(files[0]).keys() == kept.keys()
    assert cli.main(["verify", str(run.directory)]) == 0, capsys.readouterr()
    out = tmp_path / "out"
    assert cli.main(["export", str(run.checkpoint), "--to", str(out), "--dtype", "float16"]) == 0
    for place in (run.checkpoint, out):
        assert is_same(buffers(place), kept)
        opened(place)


def test_a_model_that_is_drawn_has_its_buffers_too(tmp_path):
    make_config_folder(tmp_path / "gemma4_text", "gemma4_text")
    settings = recipe(tmp_path, "gemma4_text", "zero2", "drawn", 1)
    settings["model"]["init"] = "random"
    run = train(settings)
    opened(run.checkpoint)
    assert [value.tolist() for value in buffers(run.checkpoint).values()] == [[1.0], [1.0]]
    assert cli.main(["verify", str(run.checkpoint)]) == 0
