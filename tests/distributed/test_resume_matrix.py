"""What every strategy saves at every world size is what one rank saves, and each goes on from one common checkpoint.

The oracle is one rank that shards nothing (in bfloat16: one rank under FSDP2, for its mixed precision). A sample of
this is in test_deepspeed.py and test_fsdp_layouts.py.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  takes long: once, before the ranks are forked
import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the ranks are forked
from ledger import RESULTS, Ledger, commit
from tiny import recipe_for
from training import NODES, STRATEGIES, Trained, train, train_all

SIZES = (1, 2, 3, 4)
TRAIN = {"lr_scheduler": "constant", "global_batch_size": 12, "weight_decay": 0.1, "max_grad_norm": 0.5, "eps": 1e-3}
TOUR = (("fsdp", 2), ("zero3", 3), ("ddp", 1), ("zero2", 4), ("fsdp", 2))

TOLERANCES = {"loss": 1e-5, "grad_norm": 5e-5, "weights": 5e-6, "master": 5e-6, "moments": 5e-6}
"""Loss and norm: relative. Tensors: of the tensor's largest value. fp32 sums in another order are each good to some
1e-7; AdamW's usual epsilon would blow up what a gradient of nearly zero rounds to, so it is 1e-3 here."""

BF16_WEIGHTS = 2.0**-7
"""Published weights in bfloat16 are their masters, rounded (checked to the bit): where those differ in their last
digits, the rounding may fall to the other side, a step of 2^-7 of the value at most."""


class Kind(NamedTuple):
    """What is trained; `steps` before the save, and as many behind a resume."""

    steps: int
    changes: dict[str, Any]

    def tolerance(self, name: str) -> float:
        is_bf16 = "model" in self.changes
        return BF16_WEIGHTS if name == "weights" and is_bf16 else TOLERANCES[name]


KINDS = {
    "full": Kind(3, {}),
    "lora": Kind(3, {"adapter": {"type": "lora", "rank": 4, "alpha": 8, "modules_to_save": ["lm_head"]}}),
    # One step: bfloat16 activations tell weights apart that differ by a rounding. Sequences go one by one, so that
    # every layout multiplies the same matrices.
    "bfloat16": Kind(1, {"model": {"dtype": "bfloat16"}, "train": {"micro_batch_size": 1}}),
}


def recipe(folder: Path, name: str, strategy: str, steps: int, kind: Kind, **more: Any) -> dict[str, Any]:
    changes = {**kind.changes, **more}
    changes["train"] = {**TRAIN, "max_steps": steps, **changes.get("train", {})}
    evaluate = {"at_start": False, "at_end": False}
    return recipe_for(folder, name=name, strategy=STRATEGIES[strategy], evaluate=evaluate, **changes)


def group_of(stem: str) -> str:
    """What a part of a checkpoint is called in the tables."""
    groups = {"model": "weights", "adapter_model": "weights", "master": "master"}
    return groups.get(stem.partition("-")[0], "moments")


def differences(run: Trained, expected: Trained) -> dict[str, float]:
    """The worst ones, by what is compared."""
    worst = {
        "loss": max(abs(a / b - 1) for a, b in zip(run.losses, expected.losses, strict=True)),
        "grad_norm": max(abs(a / b - 1) for a, b in zip(run.grad_norms, expected.grad_norms, strict=True)),
    }
    ours, theirs = run.tensors, expected.tensors
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        far = (ours[name].double() - value.double()).abs().max() / value.double().abs().max()
        group = group_of(name.split()[0])
        worst[group] = max(worst.get(group, 0.0), float(far))
    return worst


def check_published(run: Trained) -> None:
    """bfloat16: the weights are the masters, rounded."""
    stored = run.tensors
    masters = {name: value for name, value in stored.items() if name.startswith("master ")}
    assert masters
    for name, value in masters.items():
        assert torch.equal(stored[name.replace("master ", "model ", 1)], value.bfloat16()), name


def saved_cells(folder: Path, kind: Kind, size: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Every strategy's first checkpoint against the oracle's."""
    expected = train(recipe(folder, "oracle", "fsdp", kind.steps, kind))
    settings = [recipe(folder, f"{name}-{size}", name, kind.steps, kind) for name in STRATEGIES]
    runs = train_all(settings, size, ranks_per_node=NODES[size])
    for strategy, run in zip(STRATEGIES, runs, strict=True):
        if "model" in kind.changes:
            check_published(run)
        yield strategy, differences(run, expected)


def resumed_cells(folder: Path, kind: Kind, size: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Every strategy behind a resume from the oracle's checkpoint, against the oracle that was not interrupted."""
    whole = train(recipe(folder, "whole", "fsdp", 2 * kind.steps, kind))
    common = train(recipe(folder, "common", "fsdp", kind.steps, kind))
    settings = []
    for strategy in STRATEGIES:
        runs = folder / f"{strategy}-{size}"
        shutil.copytree(common.directory, runs / "common")
        settings.append(recipe(folder, "common", strategy, 2 * kind.steps, kind, checkpoint={"path": str(runs)}))
    for strategy, run in zip(STRATEGIES, train_all(settings, size, ranks_per_node=NODES[size]), strict=True):
        assert [line["step"] for line in run.steps] == list(range(1, 2 * kind.steps + 1))
        yield strategy, differences(run, whole)


MATRICES = {"saved": saved_cells, "resumed": resumed_cells}


def tour(folder: Path) -> dict[str, Any]:
    """One run, handed on from checkpoint to checkpoint, against one that was never interrupted."""
    whole = train(recipe(folder, "whole", "fsdp", 2 * len(TOUR), KINDS["full"]))
    for stop, (strategy, size) in enumerate(TOUR, start=1):
        run = train(recipe(folder, "tour", strategy, 2 * stop, KINDS["full"]), size)
    assert [line["step"] for line in run.steps] == list(range(1, 2 * len(TOUR) + 1))
    return {"losses": run.losses, "uninterrupted": whole.losses, "differences": differences(run, whole)}


@pytest.mark.evidence
def test_save_and_resume_matrix(tmp_path):
    """Every strategy, size and kind, and the tour; writes benchmarks/results/resume_matrix.{json,md}."""
    ledger = Ledger("resume-matrix", kinds=list(KINDS), tolerances=TOLERANCES)
    for (kind, setting), (matrix, cells), size in itertools.product(KINDS.items(), MATRICES.items(), SIZES):
        name = f"{matrix}-{kind}-{size}"
        if ledger.begin(name):
            (tmp_path / name).mkdir()
            ledger.add({name: dict(cells(tmp_path / name, setting, size))})
    if ledger.begin("tour"):
        (tmp_path / "tour").mkdir()
        ledger.add({"tour": tour(tmp_path / "tour")})
    if len(ledger.pieces) < len(KINDS) * len(MATRICES) * len(SIZES) + 1:
        ledger.pause()
    report = report_of(ledger.pieces)
    (RESULTS / "resume_matrix.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "resume_matrix.md").write_text(page_of(report))
    for row in report["rows"]:
        for name, worst in row["differences"].items():
            assert worst <= KINDS[row["kind"]].tolerance(name), row
    for name, worst in report["tour"]["differences"].items():
        assert worst <= TOLERANCES[name], report["tour"]
    ledger.close()


# --- what is written down -------------------------------------------------------------------------------------------


def report_of(pieces: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {"matrix": matrix, "kind": kind, "strategy": strategy, "world_size": size, "differences": worst}
        for kind in KINDS
        for matrix in MATRICES
        for size in SIZES
        for strategy, worst in pieces[f"{matrix}-{kind}-{size}"].items()
    ]
    return {
        "claim": "what a strategy saves at any world size is what one rank saves; from one common checkpoint each goes "
        "on as if nothing had happened; and so does one run under four strategies and world sizes in turn",
        "command": "make evidence NAME=test_save_and_resume_matrix",
        "commit": commit(),
        "seed": 0,
        "steps": {name: kind.steps for name, kind in KINDS.items()},
        "tolerance": {**TOLERANCES, "weights in bfloat16": BF16_WEIGHTS},
        "reason": "fp32 sums in another order, each good to some 1e-7 (AdamW with eps 1e-3); published bfloat16 "
        "weights are their masters rounded, checked to the bit, and may be one rounding step apart",
        "rows": rows,
        "tour": {"legs": [f"{strategy}@{size}" for strategy, size in TOUR], **pieces["tour"]},
    }


TITLES = {
    "saved": "Saved after {steps} steps, against one rank's checkpoint",
    "resumed": "Resumed from one rank's checkpoint of step {steps}, {steps} steps more, against one rank uninterrupted",
}


def page_of(report: dict[str, Any]) -> str:
    tolerances = ", ".join(f"{name} {value:.1g}" for name, value in report["tolerance"].items())
    lines = [
        "# Saves and resumes of every strategy",
        "",
        f"`{report['command']}`, seed {report['seed']}, commit {report['commit'][:12]}. Worst differences of a cell: "
        "losses and gradient norms relative, tensors of their largest value. "
        f"Tolerances: {tolerances}: {report['reason']}.",
    ]
    for kind, (steps, _) in KINDS.items():
        for matrix in MATRICES:
            rows = [row for row in report["rows"] if (row["kind"], row["matrix"]) == (kind, matrix)]
            names = [name for name in TOLERANCES if name in rows[0]["differences"]]
            lines += [
                "",
                f"## {kind}: {TITLES[matrix].format(steps=steps)}",
                "",
                f"Each cell: {' / '.join(names)}.",
                "",
            ]
            lines += table(rows, names)
    lines += ["", "## Tour", "", f"{' → '.join(report['tour']['legs'])}, two steps each, in one run:", ""]
    lines += ["| Step | loss | uninterrupted |", "|--:|--:|--:|"]
    pairs = zip(report["tour"]["losses"], report["tour"]["uninterrupted"], strict=True)
    lines += [f"| {step} | {ours:.9f} | {theirs:.9f} |" for step, (ours, theirs) in enumerate(pairs, start=1)]
    worst = ", ".join(f"{name} {value:.1e}" for name, value in report["tour"]["differences"].items())
    lines += ["", f"Worst differences at its end: {worst}."]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    yield "| | " + " | ".join(f"{size} ranks" if size > 1 else "1 rank" for size in SIZES) + " |"
    yield "|---|" + "---|" * len(SIZES)
    for strategy in STRATEGIES:
        mine = {row["world_size"]: row["differences"] for row in rows if row["strategy"] == strategy}
        cells = (" / ".join(f"{mine[size][name]:.0e}" for name in names) for size in SIZES)
        yield f"| {strategy} | " + " | ".join(cells) + " |"
