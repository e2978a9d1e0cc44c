"""A checkpoint of every strategy opens in the libraries that everybody uses, and says what the live model said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes long: once, before the ranks are forked
import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the ranks are forked
from harness import run_distributed
from ledger import RESULTS, Ledger, commit
from logits import logits, probe_batch
from peft import PeftModel
from tiny import make_model, recipe_for
from training import NODES, STRATEGIES, QuietMonitor, Trained, read_run, world_of
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import entry
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

RANKS = 4

KINDS = {
    "full": "all layers",
    "tied": "all layers, the head tied to the embeddings",
    "part": "one layer and the head, the others frozen (model.train_layers)",
    "lora": "an adapter",
    "lora-tied": "an adapter, the head tied to the embeddings",
    "lora-saved": "an adapter, and the head whole (modules_to_save)",
}
"""What is trained, each in both dtypes."""

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Absolute, of logits around 1: the same kernels on the same weights; in bfloat16 the engine computes with the very
same rounded weights, and both round activations."""


def recipe(folder: Path, strategy: str, kind: str) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "name": f"{strategy}-{kind}",
        "strategy": STRATEGIES[strategy],
        "train": {"max_steps": 2, "learning_rate": 1e-2, "lr_scheduler": "constant"},
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"every_steps": None},
    }
    if "lora" in kind:
        whole = ["lm_head"] if "saved" in kind else []
        changes["adapter"] = {"type": "lora", "rank": 4, "alpha": 8, "modules_to_save": whole}
    model: dict[str, Any] = {"path": str(folder / ("tied" if "tied" in kind else "model"))}
    model["dtype"] = "bfloat16" if "bf16" in kind else "float32"
    if "part" in kind:
        model["train_layers"] = ["model.layers.2.*", "lm_head*"]
    return recipe_for(folder, model=model, **changes)


def live_logits(rank: int, size: int, recipes: list[dict[str, Any]], folder: str) -> list[Any]:
    """Train each, and ask the model as it is when the last step is done."""
    answers = []
    train = entry.train

    def train_and_ask(run: Any) -> str:
        outcome = train(run)
        run.engine.module.eval()
        with torch.no_grad():
            answers.append(run.engine.module(probe_batch(), "own_logits").float().numpy().copy())
        return outcome

    entry.train = train_and_ask
    world = world_of(rank, NODES[size])
    for number, settings in enumerate(recipes):
        loaded = LoadedRecipe(Recipe.model_validate(settings), "test.yaml", (), ())
        entry.run_rank(entry.Job(loaded, world, f"file://{folder}/{number}", QuietMonitor(), ("test",)))
    return answers if rank == 0 else []


def check_all(folder: Path, matrix: list[tuple[str, str]], size: int) -> dict[str, dict[str, float]]:
    """By run: how far its checkpoint's logits are from the live model's at most, and how far training moved them."""
    recipe_for(folder)
    make_model(folder / "tied", tie_word_embeddings=True)
    recipes = [recipe(folder, *one) for one in matrix]
    answers = run_distributed(live_logits, size, recipes, str(folder), connect=False, timeout_s=3000)[0]
    shown = {}
    for settings, answer in zip(recipes, answers, strict=True):
        run = read_run(Path(settings["checkpoint"]["path"]) / settings["name"])
        plain, start = opened(settings, run)
        tolerance = TOLERANCE[settings["model"]["dtype"]]
        torch.testing.assert_close(plain, torch.from_numpy(answer), rtol=0, atol=tolerance, msg=settings["name"])
        difference, learned = (float((plain - other).abs().max()) for other in (torch.from_numpy(answer), start))
        assert learned > 5 * tolerance, f"{settings['name']} has learned something"
        shown[settings["name"]] = {"difference": difference, "learned": learned}
    return shown


def opened(settings: dict[str, Any], run: Trained) -> tuple[torch.Tensor, torch.Tensor]:
    """What the checkpoint says, opened as anybody would, and what the model said that it began as."""
    base = AutoModelForCausalLM.from_pretrained(settings["model"]["path"])
    start = logits(base)
    if "adapter" in settings:
        return logits(PeftModel.from_pretrained(base, run.checkpoint)), start
    model, report = AutoModelForCausalLM.from_pretrained(run.checkpoint, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), settings["name"]
    assert model.dtype == getattr(torch, settings["model"]["dtype"])
    return logits(model), start


def test_every_strategy_in_full_and_with_an_adapter(tmp_path):
    """Embeddings tied to the head, frozen layers, modules that are saved whole and bfloat16, with some strategies
    each."""
    kinds = (("full", "lora-tied"), ("tied-bf16", "lora"), ("part", "lora-saved-bf16"))
    check_all(tmp_path, [(name, kind) for place, name in enumerate(STRATEGIES) for kind in kinds[place % 3]], 2)


@pytest.mark.evidence
def test_every_kind_of_checkpoint_opens(tmp_path):
    """Writes benchmarks/results/checkpoints_open.{json,md}."""
    strategies = list(STRATEGIES)
    kinds = [kind + dtype for kind in KINDS for dtype in ("", "-bf16")]
    ledger = Ledger("checkpoints-open", kinds=kinds, ranks=RANKS)
    for name in strategies:
        if ledger.begin(name):
            ledger.add({name: check_all(tmp_path / name, [(name, kind) for kind in kinds], RANKS)})
    if len(ledger.pieces) < len(strategies):
        ledger.pause()
    report = report_of({name: ledger.pieces[name] for name in strategies}, kinds)
    assert len(report["runs"]) == len(strategies) * len(kinds)
    (RESULTS / "checkpoints_open.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "checkpoints_open.md").write_text(page_of(report))
    ledger.close()


# --- what is written down -------------------------------------------------------------------------------------------


def report_of(pieces: dict[str, dict[str, dict[str, float]]], kinds: list[str]) -> dict[str, Any]:
    """`differences`: by kind and strategy."""
    return {
        "claim": "the checkpoint of every strategy and kind of training opens with plain from_pretrained (PeftModel "
        "for an adapter), without a missing or unexpected tensor, and says what the live model said at the end",
        "command": "make evidence NAME=test_every_kind_of_checkpoint_opens",
        "commit": commit(),
        "ranks": RANKS,
        "tolerance": TOLERANCE,
        "kinds": KINDS,
        "differences": {
            kind: {name: runs[f"{name}-{kind}"]["difference"] for name, runs in pieces.items()} for kind in kinds
        },
        "runs": {name: shown for runs in pieces.values() for name, shown in runs.items()},
    }


def page_of(report: dict[str, Any]) -> str:
    """The table, for readers."""
    names = list(next(iter(report["differences"].values())))
    least = min(shown["learned"] for shown in report["runs"].values())
    lines = [
        "# Checkpoints open",
        "",
        f"{len(report['runs'])} runs on {report['ranks']} gloo ranks; each checkpoint is opened with plain "
        "`from_pretrained` (an adapter with `PeftModel`), without a missing or unexpected tensor. Below: the largest "
        "difference between its logits (around 1) and the live model's after the last step; limits "
        f"{report['tolerance']['float32']:g} in float32 and {report['tolerance']['bfloat16']:g} in bfloat16. Training "
        f"moved each by {least:.2g} or more.",
        "",
        f"`{report['command']}`, commit {report['commit'][:12]}.",
        "",
        "| Trained | " + " | ".join(names) + " |",
        "|---|" + "--:|" * len(names),
    ]
    for kind, found in report["differences"].items():
        what = report["kinds"][kind.removesuffix("-bf16")] + (", bfloat16" if kind.endswith("-bf16") else "")
        lines.append(f"| {what} | " + " | ".join(f"{found[name]:.1e}" for name in names) + " |")
    return "\n".join(lines) + "\n"
