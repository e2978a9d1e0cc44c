"""Advice of `ftlaunch check` on the recipe: nothing for a sound one, and one thing for each thing that is off."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from tiny import chat_rows, make_tokenizer, text_rows, write_jsonl, write_recipe

from ftlaunch.launcher import cli
from ftlaunch.launcher.check_findings import KINDS

from .test_check_faults import ROWS, SOURCES

LORA = "adapter={type: lora}"
WEIGHTS = ("data.train.0.weight=0.5", "data.train.1.weight=0.5")

OFF = (
    ("learning-rate-high", "train.learning_rate", ["train.learning_rate=1e-3"]),
    ("learning-rate-low", "train.learning_rate", ["train.learning_rate=1e-7"]),
    ("learning-rate-low", "train.learning_rate", [LORA, "train.learning_rate=2e-5"]),
    ("learning-rate-high", "train.learning_rate", [LORA, "train.learning_rate=2e-3"]),
    ("many-epochs", "train.num_epochs", ["train.num_epochs=8"]),
    ("few-steps", "train.global_batch_size", ["train.global_batch_size=64"]),
    ("sequence-short", "data.sequence_length", ["data.sequence_length=96"]),
    ("sequence-long", "data.sequence_length", ["data.sequence_length=100000", "train.num_epochs=1"]),
    ("sequence-long", "data.sequence_length", ["data.sequence_length=4096", "data.packing=false"]),
    ("packing-off", "data.packing", ["data.packing=false"]),
    ("no-eval", "data.eval", ["data.eval=[]"]),
    ("repeated-source", "text", WEIGHTS),
    ("repeated-source", "text", ["data.train.1.num_epochs=12"]),
    ("few-examples", "data.train", ["data.train=[{path: FOLDER/few.jsonl}, {path: FOLDER/text.jsonl}]"]),
    ("no-replay", "data.train", ["data.train=[{path: FOLDER/chat.jsonl}]"]),
)  # fmt: skip
"""(code, where it is found, what makes the sound recipe deserve it)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    make_tokenizer(folder / "model")
    write_jsonl(folder / "chat.jsonl", chat_rows(300, seed=1))
    write_jsonl(folder / "text.jsonl", text_rows(30, seed=2, words=(20, 40)))
    write_jsonl(folder / "few.jsonl", chat_rows(20, seed=3))
    write_jsonl(folder / "held-out.jsonl", chat_rows(380, seed=4)[300:])
    recipe = {
        "name": "sound",
        "model": {"path": str(folder / "model")},
        "data": {
            "sequence_length": 512,
            "train": [{"path": str(folder / "chat.jsonl")}, {"path": str(folder / "text.jsonl")}],
            "eval": [{"path": str(folder / "held-out.jsonl")}],
        },
        "train": {"num_epochs": 3, "global_batch_size": 8, "learning_rate": 2e-5},
        "checkpoint": {"path": str(folder / "runs")},
    }
    write_recipe(folder / "recipe.yaml", recipe)
    return folder


def found(folder: Path, *overrides: str) -> dict[str, str]:
    """Where each code was found."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["check", str(folder / "recipe.yaml"), "--json", *overrides])
    return {finding["code"]: finding["where"] for finding in json.loads(out.getvalue())["findings"]}


def test_a_sound_recipe_on_sound_data_gets_no_advice(folder):
    assert found(folder) == {}


@pytest.mark.parametrize(("code", "where", "overrides"), OFF)
def test_what_is_off_is_said(folder, code, where, overrides):
    there = found(folder, *(override.replace("FOLDER", str(folder)) for override in overrides))
    assert there.get(code) == where


@pytest.mark.parametrize(
    "overrides",
    [
        [LORA, "train.learning_rate=2e-4", "train.num_epochs=9"],
        ["model.init=random", "train.learning_rate=1e-3"],
        ["data.eval={fraction: 0.2}", "train.num_epochs=5"],
        [*WEIGHTS, "data.train.1.repeat=false"],
        [*WEIGHTS, "data.train.1.num_epochs=2"],
    ],
)
def test_what_is_usual_is_not_complained_about(folder, overrides):
    assert found(folder, *overrides).keys() <= {"small-eval"}


def test_every_kind_is_planted_somewhere():
    """Four need a recipe or a tokenizer of their own, and have tests of their own."""
    alone = {"truncated", "overlong-refused", "end-not-learned", "unknown-token"}
    planted = {fault.code for _, _, faults in ROWS for fault in faults} | {code for code, _ in SOURCES}
    assert planted | {code for code, _, _ in OFF} | alone == set(KINDS)


def test_every_code_is_in_the_documentation_with_its_severity():
    page = (Path(__file__).resolve().parents[3] / "docs" / "check.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    assert {code.strip(" `"): severity.strip() for code, severity in rows} == {
        code: kind.severity for code, kind in KINDS.items()
    }
