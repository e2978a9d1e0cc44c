"""`ftlaunch selftest` through the command line: layouts that agree, and planted mistakes that it must find and name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes long: once, before the ranks are forked
import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from harness import nothing_to_collect
from tiny import make_tokenizer, recipe_for, write_recipe
from transformers import GPT2Config, GPT2LMHeadModel

from ftlaunch.distributed import (
    trial,  # noqa: F401  imported before the ranks are forked
)
from ftlaunch.distributed.strategies.fsdp import FsdpEngine
from ftlaunch.launcher import cli, selftest_layouts, selftest_ranks, selftest_recipe
from ftlaunch.launcher.selftest_layouts import WAYS

FEW = ("ddp", "fsdp")


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.fixture
def selftest(tmp_path, temporary, monkeypatch, capfd) -> Any:
    """`ftlaunch selftest` on a small recipe with ranks that are forked, so that they have what a test has planted:
    (exit code, lines of the table, all that was said)."""
    monkeypatch.setattr(selftest_ranks, "START_METHOD", "fork")
    monkeypatch.chdir(tmp_path)

    def run(*words: str, ways: tuple[str, ...] = FEW, **changes: Any) -> tuple[int, dict[str, str], str]:
        monkeypatch.setattr(selftest_layouts, "WAYS", {name: WAYS[name] for name in ways})
        evaluate = {"evaluate": {"at_start": False}, "checkpoint": {"every_steps": None}}
        path = write_recipe(tmp_path / "tiny.yaml", recipe_for(tmp_path, **evaluate | changes))
        with nothing_to_collect():
            code = cli.main(["selftest", str(path), *words])
        said = "".join(capfd.readouterr())
        lines = (line.strip().partition("  ") for line in said.splitlines() if line.startswith("  "))
        rows = [line for line in lines if line[0].endswith(("float32", "bfloat16")) and line[2]]
        assert list(temporary.iterdir()) == [], "what was made is gone"
        assert not (tmp_path / "runs").exists(), "nothing lies among the user's runs"
        return code, {name: rest.strip() for name, _, rest in rows}, said

    return run


def test_every_way_agrees(selftest):
    """Packing, weighted sources, clipping, a batch that the ranks do not divide."""
    changes = {"train": {"global_batch_size": 7, "weight_decay": 0.1, "max_grad_norm": 0.5, "seed": 3}}
    code, rows, said = selftest("--ranks", "2", "--steps", "3", ways=tuple(WAYS), **changes)
    assert code == 0, said
    names = {name.partition(",")[0] for name in rows}
    assert names == set(WAYS)
    judged = [row for row in rows.values() if "compared with" not in row]
    assert len(judged) >= len(WAYS) and all(row.endswith("agrees") for row in judged), said
    assert "hybrid, 2 ranks on 2 nodes, micro-batch 2, float32" in rows
    assert f"all {len(judged)} layouts agree" in said
    assert "tolerance: 1e-05 in the first step, 0.0002 behind it" in said


def test_gradients_that_are_averaged_in_one_layout_are_found_and_named(selftest, monkeypatch):
    """The classic mistake: a mean over ranks where a sum belongs."""
    backward = FsdpEngine.backward

    def averaging(self: Any, loss_sum: torch.Tensor, weight_total: float, **about: Any) -> None:
        ranks = self._world.size if self._recipe.strategy.type == "ddp" else 1
        backward(self, loss_sum / ranks, weight_total, **about)

    monkeypatch.setattr(FsdpEngine, "backward", averaging)
    code, rows, said = selftest("--ranks", "2")
    assert code == 1
    differing = {name for name, row in rows.items() if row.endswith("DIFFERS")}
    assert differing == {"ddp, 2 ranks, micro-batch 2, float32"}, said
    assert "ddp, 2 ranks, micro-batch 2, float32: the gradient norm of step 1 is 5.0e-01 off" in said
    assert "gradients are 0.5 times the reference's, which is the number of ranks (2)" in said


def test_a_model_that_mixes_its_batch_is_found(selftest, monkeypatch):
    """Norms over the whole micro-batch: what a sequence learns depends on which others come with it."""

    def over_the_batch(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = hidden * torch.rsqrt(hidden.pow(2).mean() + self.variance_epsilon)
        return self.weight * scaled

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", over_the_batch)
    # Packed samples would see each other too, and that is refused already.
    code, rows, said = selftest("--ranks", "2", "--steps", "1", data={"packing": False})
    assert code == 1
    outcomes = {name: row.endswith("agrees") for name, row in rows.items() if "compared with" not in row}
    assert {name for name, agrees in outcomes.items() if not agrees} == {n for n in outcomes if "micro-batch 2" in n}
    assert any(outcomes.values()), said
    assert "of step 1 is" in said
    assert "which sequences share a micro-batch" in said
    assert "no layout with micro-batches of 2 agrees, those of 1 do" in said


def test_an_optimizer_that_is_bound_to_the_layout_is_marked_and_not_failed(selftest):
    changes = {"train": {"optimizer": "muon", "learning_rate": 1e-3}}
    code, rows, said = selftest("--ranks", "2", "--steps", "2", ways=("fsdp",), **changes)
    assert code == 0, said
    judged = [row for row in rows.values() if "compared with" not in row]
    assert judged and all(row.endswith("layout-bound") for row in judged)
    assert "layout-bound: muon: its iterations compute in bfloat16" in said


def test_a_strategy_that_does_not_fit_the_recipe_says_why_and_is_not_run(selftest):
    code, rows, said = selftest(
        "--ranks", "1", "--steps", "1", ways=("fsdp", "zero2"), train={"optimizer": "adafactor"}
    )
    assert code == 0, said
    [zero] = [row for name, row in rows.items() if name.startswith("zero2")]
    assert zero.startswith("not run: train.optimizer: DeepSpeed holds tensors in flat pieces")


def test_a_recipe_whose_own_strategy_cannot_be_run_has_not_passed(selftest, monkeypatch):
    monkeypatch.setattr(selftest_recipe, "find_spec", lambda name: None)
    code, _, said = selftest("--ranks", "1", "--steps", "1", ways=(), strategy={"type": "deepspeed", "stage": 2})
    assert code == 1
    assert "the recipe's own strategy could not be run: deepspeed is not installed" in said


def test_dropout_is_compared_where_the_same_sequences_share_a_micro_batch(selftest):
    adapter = {"type": "lora", "rank": 4, "dropout": 0.3}
    code, rows, said = selftest("--ranks", "2", "--steps", "2", ways=("ddp",), adapter=adapter)
    assert code == 0, said
    assert sum("compared with" in row for row in rows.values()) == 2, "one for each micro-batch size"
    assert all(row.endswith("agrees") for row in rows.values() if "compared with" not in row), said
    # Two ranks do not divide 7 sequences into the same pairs as one does.
    odd = {"train": {"global_batch_size": 7}, "data": {"packing": False}}
    code, rows, said = selftest("--ranks", "2", "--steps", "1", ways=("fsdp",), adapter=adapter, **odd)
    assert code == 0, said
    assert {row.rpartition("  ")[2] for name, row in rows.items() if "2 ranks" in name} == {"agrees", "other dropout"}
    assert "values are dropped once per micro-batch" in said


def test_in_bfloat16_each_way_is_compared_with_fsdp(selftest):
    code, rows, said = selftest("--ranks", "2", ways=("fsdp", "zero3"), model={"dtype": "bfloat16"})
    assert code == 0, said
    half = {name: row for name, row in rows.items() if "bfloat16" in name}
    assert "compared with" in half.pop("fsdp, 2 ranks, micro-batch 2, bfloat16")
    assert len(half) == 1 and all(row.endswith("agrees") for row in half.values()), said
    assert sum("float32" in name for name in rows) >= 4


def test_a_rank_that_dies_is_a_failure_of_its_layout_and_others_go_on(selftest, monkeypatch):
    step = FsdpEngine.step

    def dying(self: Any) -> float:
        if self._recipe.strategy.type == "ddp" and self._world.rank == 1:
            os.write(2, b"out of luck\n")
            os._exit(3)
        return step(self)

    monkeypatch.setattr(FsdpEngine, "step", dying)
    monkeypatch.setattr(selftest_ranks, "GRACE_S", 1.0)
    code, rows, said = selftest("--ranks", "2", "--steps", "1", ways=(*FEW, "hybrid"))
    assert code == 2
    [ddp] = [row for name, row in rows.items() if name.startswith("ddp")]
    assert ddp == "failed, see below"
    assert "rank 1 died with exit code 3" in said and "out of luck" in said
    after = list(rows)[list(rows).index("ddp, 2 ranks, micro-batch 2, float32") + 1 :]
    assert after and all(rows[name].endswith("agrees") for name in after), said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--steps", "1", "--ranks", "0"], "--ranks 0: at least 1"),
        (["model.path=./nowhere/model"], "there is no folder"),
        (["data.train=[{path: nowhere.jsonl}]"], "nowhere.jsonl"),
        (["train.learning_rate=1e30", "train.max_grad_norm=null"], "cannot be run: step 2: the loss is"),
    ],
)
def test_what_cannot_be_tested_is_exit_1(selftest, words, said):
    code, _, text = selftest(*words, *([] if "--ranks" in words else ["--ranks", "1"]))
    assert code == 1
    assert said in " ".join(text.split()), text


def test_a_model_that_is_too_large_is_not_tried(selftest, monkeypatch):
    from ftlaunch.launcher import selftest as module

    class Free:
        available = total = 1000

    monkeypatch.setattr(module.psutil, "virtual_memory", Free)
    code, _, said = selftest("--ranks", "1")
    assert code == 1
    assert "it takes about" in said and "1000 B are there" in said and "--scale-down" in said


def test_scaled_down_in_processes_of_its_own(selftest, tmp_path, monkeypatch):
    """Another family, tied, whose weights are not even there; ranks started as they are for users."""
    monkeypatch.setattr(selftest_ranks, "START_METHOD", "spawn")
    folder = make_tokenizer(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=307, n_embd=1024, n_head=8, n_layer=48, n_positions=256, resid_pdrop=0.0)
    config.embd_pdrop = config.attn_pdrop = 0.0
    config.save_pretrained(folder)
    assert GPT2LMHeadModel.config_class is GPT2Config
    words = ["--ranks", "1", "--steps", "1", "--scale-down", f"model.path={folder}", "data.packing=false"]
    code, rows, said = selftest(*words)
    assert code == 0, said
    assert "gpt2 (random, n_layer 2 of 48, n_embd 128 of 1024, n_head 1 of 8)" in said
    assert [row.rpartition("  ")[2] for row in rows.values()].count("agrees") >= 1
