"""DeepSpeed ZeRO: what it holds, saves and loads is what every other strategy does, at any world size.

That losses and gradient norms are the same, test_training_layout.py shows; test_resume_matrix.py has the whole of this.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer
import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the ranks are forked
from harness import run_distributed
from one_rank import Rank, alone, read_steps
from peft import PeftModel
from processes import run as run_command
from processes import torchrun
from tiny import make_model, recipe_for, write_recipe
from torch._dynamo.utils import counters
from training import STRATEGIES, Trained, train, train_all
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import loss_model as loss_models
from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import UserError

ZERO = [name for name in STRATEGIES if name.startswith("zero")]
LORA = {"type": "lora", "rank": 4, "alpha": 8}
TRAIN = {"lr_scheduler": "constant", "global_batch_size": 12, "weight_decay": 0.1, "max_grad_norm": 0.5, "eps": 1e-3}

OTHERS: dict[str, dict[str, Any]] = {
    "zero1-offload": {"type": "deepspeed", "stage": 1, "offload_optimizer": "cpu"},
    "zero3-offload-optimizer": {**STRATEGIES["zero3"], "offload_optimizer": "cpu"},
    "zero2-buckets": {"type": "deepspeed", "stage": 2, "deepspeed_config": {"zero_optimization": {
        "round_robin_gradients": True, "reduce_bucket_size": 5000}}},
    "zero3-groups": {"type": "deepspeed", "stage": 3, "deepspeed_config": {"zero_optimization": {
        "stage3_param_persistence_threshold": 0, "sub_group_size": 9000, "reduce_bucket_size": 5000}}},
}  # fmt: skip
"""What `strategy: auto` may choose besides, and settings that lay the same tensors out otherwise: in another order, in
several flat groups (each rank has some 19,000 elements), sent in many buckets that are smaller than some tensors."""

SUM_TOLERANCE = 5e-6
"""Relative, of the largest value of a tensor: fp32 sums in another order, each good to some 1e-7, over a few updates
(measured: 1.3e-6). AdamW's usual epsilon would blow up what a gradient of nearly zero rounds to; here it is larger."""


def recipe(folder: Path, name: str, strategy: str, steps: int, **changes: Any) -> dict[str, Any]:
    changes["train"] = {**TRAIN, "max_steps": steps, **changes.get("train", {})}
    laid_out = {**STRATEGIES, **OTHERS}[strategy]
    return recipe_for(folder, name=name, strategy=laid_out, evaluate={"at_start": False}, **changes)


def check_tensors(run: Trained, expected: Trained, tolerance: float) -> None:
    ours, theirs = run.tensors, expected.tensors
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        difference = (ours[name].double() - value.double()).abs().max()
        assert difference <= tolerance * value.double().abs().max(), name


@pytest.mark.parametrize("adapter", [None, {**LORA, "modules_to_save": ["lm_head"]}])
def test_checkpoints_are_those_of_one_rank(tmp_path, adapter):
    """Weights and moments, tensor by tensor, at a size that divides nothing."""
    names = [*ZERO, *OTHERS] if adapter is None else ["zero2", "zero3"]
    check_checkpoints(tmp_path, [(3, names)], adapter=adapter)


def check_checkpoints(folder: Path, matrix: list[tuple[int, list[str]]], **changes: Any) -> None:
    expected = train(recipe(folder, "one", "fsdp", 3, **changes))
    for size, names in matrix:
        for run in train_all([recipe(folder, f"{name}-{size}", name, 3, **changes) for name in names], size):
            check_tensors(run, expected, SUM_TOLERANCE)


MATRIX = [(2, ["zero1", "zero3", "zero3-groups"]), (3, ["zero2-buckets", "zero2-offload", "zero3-offload"])]


def test_each_goes_on_from_one_common_checkpoint(tmp_path):
    """Saved by one rank after three steps; the losses go on as they would have."""
    check_resumes(tmp_path, MATRIX)


def check_resumes(tmp_path: Path, matrix: list[tuple[int, list[str]]], **changes: Any) -> None:
    whole = train(recipe(tmp_path, "whole", "fsdp", 6, **changes))
    common = train(recipe(tmp_path, "common", "fsdp", 3, **changes))
    for size, names in matrix:
        settings = []
        for strategy in names:
            runs = tmp_path / f"{strategy}-{size}"
            shutil.copytree(common.directory, runs / "common")
            settings.append(recipe(tmp_path, "common", strategy, 6, checkpoint={"path": str(runs)}, **changes))
        for run in train_all(settings, size):
            assert run.losses == pytest.approx(whole.losses, rel=1e-5)
            check_tensors(run, whole, SUM_TOLERANCE)


@pytest.mark.evidence
def test_a_tour_of_strategies_and_world_sizes(tmp_path):
    """One run, handed on from checkpoint to checkpoint, against one that was never interrupted. One step of it each
    are the test above and test_running_again.py's of world sizes and strategies."""
    tour = [("fsdp", 2), ("zero3", 3), ("ddp", 1), ("zero2", 4), ("fsdp", 2), ("zero3-offload", 2), ("zero1", 3)]
    steps = 2 * len(tour)
    whole = train(recipe(tmp_path, "whole", "fsdp", steps))
    for stop, (strategy, size) in enumerate(tour, start=1):
        toured = train(recipe(tmp_path, "tour", strategy, 2 * stop), size)
    assert [line["step"] for line in toured.steps] == list(range(1, steps + 1))
    assert toured.losses == pytest.approx(whole.losses, rel=1e-5)
    assert toured.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4)


def steps_of_losses(rank: int, size: int, settings: dict[str, Any]) -> list[tuple[float, bool, float]]:
    """Steps whose loss is infinite, NaN and as it is: the norm, whether anything that a checkpoint holds changed, and
    by how much the losses of a batch did."""
    made = Rank.build(settings, World(rank=rank, size=size, local_rank=rank, local_size=size))
    batch = {name: torch.arange(1, 33).remainder(29)[None] for name in ("input_ids", "targets")}

    def state() -> tuple[list[torch.Tensor], torch.Tensor]:
        held = [piece.values.clone() for part in made.engine.parts for piece in made.engine.fragments(part)]
        made.engine.module.eval()
        with torch.no_grad():
            return held, made.engine.module(batch)

    def step(factor: float) -> tuple[float, bool, float]:
        held, losses = state()
        made.engine.module.train()
        made.engine.backward(made.engine.module(batch).sum() * factor, 32.0, last_micro_batch=True)
        norm = made.engine.step()
        now, losses_now = state()
        changed = any(not torch.equal(old, new) for old, new in zip(held, now, strict=True))
        return norm, changed, float((losses_now - losses).abs().max())

    return [step(factor) for factor in (float("inf"), float("nan"), 1.0)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_that_is_not_finite_changes_nothing(tmp_path, dtype):
    """And the same step with a loss that is finite does, so that the test would see it."""
    for strategy in ZERO if dtype == "bfloat16" else ZERO[1:3]:
        settings = recipe(tmp_path, "inf", strategy, 3, model={"dtype": dtype})
        for *broken, whole in run_distributed(steps_of_losses, 2, settings):
            for norm, changed, difference in broken:
                assert not math.isfinite(norm)
                assert (changed, difference) == (False, 0.0), strategy
            norm, changed, difference = whole
            assert math.isfinite(norm) and changed and difference > 0, strategy


def test_bfloat16_has_fp32_masters(tmp_path):
    """One step on three ranks, without clipping: what fsdp sums, in fp32, and in bfloat16 the very same weights but for
    those that lie between two of its values. Dividing by the number of ranks, in bfloat16, would show as 5e-3."""
    changes: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "train": {"max_grad_norm": None}}
    names = ["fsdp", *ZERO]
    runs = train_all([recipe(tmp_path, name, name, 1, **changes) for name in names], 3)
    for run in runs:
        stored = run.tensors
        assert {value.dtype for key, value in stored.items() if key.startswith("model")} == {torch.bfloat16}
        assert {value.dtype for key, value in stored.items() if key.startswith("master")} == {torch.float32}
        for key, value in stored.items():
            if key.startswith("model "):
                assert torch.equal(value, stored[key.replace("model ", "master ", 1)].bfloat16()), key
            else:
                torch.testing.assert_close(value, runs[0].tensors[key], rtol=1e-5, atol=1e-7, msg=key)
        assert run.grad_norms == pytest.approx(runs[0].grad_norms, rel=1e-6)


def test_adapters_are_saved_alone_and_nothing_is_gathered(tmp_path):
    """Under ZeRO-3, where frozen weights are sharded too."""
    [run] = train_all([recipe(tmp_path, "adapted", "zero3", 3, adapter=LORA)], 2)
    names = [path.name for path in run.checkpoint.glob("**/*.safetensors")]
    assert sorted(names) == ["adapter_model.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"]
    gathers = run_distributed(gathers_of_a_save, 2, recipe(tmp_path, "gathers", "zero3", 3, adapter=LORA))
    assert all(forward > 0 and save == 0 for forward, save in gathers)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    plain = base(torch.arange(20)[None]).logits
    adapted = PeftModel.from_pretrained(base, run.checkpoint)(torch.arange(20)[None]).logits
    assert not torch.equal(plain, adapted)


def gathers_of_a_save(rank: int, size: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Gathers of a forward pass, and of all fragments."""
    made = Rank.build(settings, World(rank=rank, size=size, local_rank=rank, local_size=size))
    calls = []
    original = deepspeed.comm.comm.cdb.all_gather_function
    deepspeed.comm.comm.cdb.all_gather_function = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    batch = {name: torch.arange(1, 33).remainder(29)[None] for name in ("input_ids", "targets")}
    with torch.no_grad():
        made.engine.module(batch)
    forward = len(calls)
    for part in made.engine.parts:
        list(made.engine.fragments(part))
    return forward, len(calls) - forward


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_activation_checkpointing_changes_nothing(tmp_path, strategy):
    plain, recomputed = (
        recipe(tmp_path, f"recompute-{on}", strategy, 3, train={"activation_checkpointing": on}) for on in (False, True)
    )
    plain_run, recomputed_run = train_all([plain, recomputed], 2)
    assert recomputed_run.losses == pytest.approx(plain_run.losses, rel=1e-6)


def test_dropout_falls_as_under_fsdp_behind_an_evaluation(tmp_path):
    """DeepSpeed's engine does not know in which mode its model is, and the probes before the first step evaluate. The
    second step learns from what the first one made of other numbers."""
    names = ["fsdp", "zero2", "zero3"]
    adapter = {**LORA, "dropout": 0.4}
    runs = train_all([recipe(tmp_path, name, name, steps=2, adapter=adapter) for name in names], 2)
    [without] = train_all([recipe(tmp_path, "without", "zero2", steps=2, adapter=LORA)], 2)
    for run in runs:
        assert run.losses == pytest.approx(runs[0].losses, rel=SUM_TOLERANCE)
        assert run.grad_norms[0] != pytest.approx(without.grad_norms[0], rel=1e-3)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_blocks_are_recomputed_where_the_recipe_says_so(tmp_path, strategy):
    """Their forward pass begins a second time, in the backward pass, and ends when all is there that is wanted."""

    def calls(again: bool) -> int:
        one = recipe(tmp_path, f"again-{again}", strategy, 1, train={"activation_checkpointing": again})
        with alone() as group:
            rank = Rank.build(one)
            rank.engine.module.eval()
            assert not rank.engine.module.training
            rank.engine.module.train()
            assert rank.engine.module.training
            counted: list[int] = []
            rank.built.blocks()[0].mlp.register_forward_pre_hook(lambda *_: counted.append(1))
            [step] = read_steps(one, group, 1)
            rank.accumulate(step)
            return len(counted) // len(step.micro_batches)

    assert (calls(False), calls(True)) == (1, 2)


def test_a_head_in_chunks_differs_between_ranks(tmp_path, monkeypatch):
    """Ranks with other numbers of supervised tokens take other numbers of chunks; a head that each chunk gathered would
    leave them waiting for each other."""
    monkeypatch.setitem(loss_models.LOGITS_BYTES, "cpu", 4 * 307 * 7)
    tied = tmp_path / "tied"
    make_model(tied, tie_word_embeddings=True)
    settings = []
    for adapter in (None, {**LORA, "target_modules": ["q_proj", "lm_head"]}):
        for strategy in ("fsdp", "zero3"):
            name = f"{strategy}-{'lora' if adapter else 'full'}"
            settings.append(recipe(tmp_path, name, strategy, 3, adapter=adapter, data={"packing": False}))
    settings += [recipe(tmp_path, f"tied-{s}", s, 3, model={"path": str(tied)}) for s in ("fsdp", "zero3")]
    runs = train_all(settings, 2)
    for expected, run in zip(runs[::2], runs[1::2], strict=True):
        assert run.losses == pytest.approx(expected.losses, rel=1e-5), run.directory.name


VARIANTS: dict[str, dict[str, Any]] = {
    "pissa": {**LORA, "init": "pissa"},
    "dora": {**LORA, "use_dora": True},
}


def test_variants_of_lora_under_zero3(tmp_path):
    names = ("fsdp", "zero3")
    runs = train_all(
        [recipe(tmp_path, f"{v}-{n}", n, 3, adapter=adapter) for v, adapter in VARIANTS.items() for n in names], 2
    )
    for expected, run in zip(runs[::2], runs[1::2], strict=True):
        assert run.losses == pytest.approx(expected.losses, rel=1e-5), run.directory.name
        check_tensors(run, expected, SUM_TOLERANCE)


def loss_norm_and_graphs(rank: int, size: int, settings: dict[str, Any]) -> tuple[float, float, int]:
    """One step's loss and gradient norm, and how many graphs were compiled for it."""
    counters.clear()
    made = Rank.build(settings)
    batch = {name: torch.arange(1, 33).remainder(29)[None] for name in ("input_ids", "targets")}
    loss = made.engine.module(batch).sum()
    made.engine.backward(loss, 32.0, last_micro_batch=True)
    return float(loss.detach()), made.engine.step(), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.evidence)])
def test_compiled_blocks_under_zero2(tmp_path, monkeypatch, backend):
    """Fused kernels round elsewhere, and learn the same; see test_training_options.py for the bound. There they are
    made in the quick tier; here it is the graphs that count, which DeepSpeed's hooks might break."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))  # what Module.compile calls
    make_model(tmp_path / "one-block", num_hidden_layers=1)
    settings = recipe(tmp_path, "compiled", "zero2", 1, model={"path": str(tmp_path / "one-block")})
    [(*plain, none)] = run_distributed(loss_norm_and_graphs, 1, settings)
    settings["train"]["compile"] = True
    [(*compiled, graphs)] = run_distributed(loss_norm_and_graphs, 1, settings, timeout_s=600.0)
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert none == 0 and graphs > 0


def test_a_run_is_quiet_and_needs_no_compiler(tmp_path):
    """What DeepSpeed prints is not shown, and a compiler that is called fails the run."""
    broken = tmp_path / "bin"
    broken.mkdir()
    for name in ("g++", "c++", "cc", "gcc", "ninja", "nvcc"):
        (broken / name).write_text("#!/bin/sh\necho a compiler was called\nexit 1\n")
        (broken / name).chmod(0o755)
    path = write_recipe(tmp_path / "r.yaml", recipe(tmp_path, "quiet", "zero3", 2, model={"dtype": "bfloat16"}))
    environment = {"PATH": f"{broken}:{os.environ['PATH']}", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    code, output = run_command(torchrun(2, str(path)), tmp_path, environment)
    assert code == 0, output
    for word in ("deepspeed", "[WARNING]", "Warning", "compiler", "MA "):
        assert word.lower() not in output.lower(), output
    assert not (tmp_path / "extensions").exists()


def test_deepspeed_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with alone(), pytest.raises(UserError, match=r"deepspeed cannot be imported .*pip install 'ftlaunch\[deepspeed\]'"):
        Rank.build(recipe(tmp_path, "missing", "zero2", 3))


def test_another_series_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", "0.20.1")
    with alone(), pytest.raises(UserError, match=r"deepspeed 0\.20\.1 is installed"):
        Rank.build(recipe(tmp_path, "other", "zero2", 3))
