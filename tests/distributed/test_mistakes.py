"""What users get for their mistakes: a message that says what, where and what to do, and exit code 1."""

from __future__ import annotations

import json
import re

import pytest
from mistakes import MISTAKES, Mistake, prepare, train_path
from tiny import write_parquet

from ftlaunch.distributed import entry
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.distributed.data import memory
from ftlaunch.launcher import cli


def answer(mistake, folder, capsys, monkeypatch) -> tuple[int, str]:
    """Exit code and what was printed. Mistakes that a rank finds are made on one rank in this process."""
    arguments = prepare(mistake, folder)
    monkeypatch.chdir(folder)
    if mistake.title == MISTAKES["recipe"].title:
        arguments[0] = "recpie.yaml"
    code = cli.main(arguments) if mistake.before_ranks else entry.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("name", MISTAKES)
def test_the_answer_says_what_where_and_what_to_do(name, tmp_path, capsys, monkeypatch):
    mistake = MISTAKES[name]
    code, text = answer(mistake, tmp_path, capsys, monkeypatch)
    assert code == mistake.exit_code, text
    assert "Traceback" not in text
    unwrapped = " ".join(text.split())
    for part in mistake.says:
        assert part in unwrapped, text


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    """The first step is saved, the second is refused: its rows are named and the checkpoint is whole."""
    arguments = [*prepare(MISTAKES["nan"], tmp_path), "checkpoint.every_steps=1"]
    monkeypatch.chdir(tmp_path)
    assert entry.main(arguments) == 1
    assert re.search(r"step 2: the loss is nan[\s\S]*chat.jsonl, .*row", capsys.readouterr().err)
    (commit,) = (tmp_path / "runs/tiny/commits").iterdir()
    kept = json.loads(commit.read_text())
    assert kept["step"] == 1
    assert verify_checkpoint(str(tmp_path / "runs/tiny" / kept["directory"])) == []


def test_what_a_refusal_offers_is_understood_under_torchrun_too(tmp_path, capsys, monkeypatch):
    arguments = [*prepare(MISTAKES["nan"], tmp_path), "train.learning_rate=1e-4"]
    monkeypatch.chdir(tmp_path)
    assert entry.main([*arguments, "train.max_steps=1"]) == 0
    seen = capsys.readouterr().err
    assert "[ftlaunch] reading the data's index …\n" in seen and "phase=" not in seen
    changed = ["train.max_steps=2", "train.seed=5"]
    assert entry.main([*arguments, *changed, "--fresh"]) == 1
    assert "--accept-changed-data can be given. Give the new run another name" in (capsys.readouterr().err)
    assert entry.main([*arguments, *changed, "--accept-changes"]) == 0
    assert "extending run" in capsys.readouterr().err


def test_a_row_group_that_memory_does_not_hold_is_refused_before_anything_is_started(tmp_path, capsys, monkeypatch):
    arguments = prepare(Mistake("", train_path("wide.parquet", format="text"), ()), tmp_path)
    rows = [{"text": f"{number} {'0123456789' * 100}"} for number in range(100)]
    write_parquet(tmp_path / "wide.parquet", rows, row_group_size=100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "free_bytes", lambda: 20_000)
    for command in (cli.main, entry.main):
        assert command(arguments) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(r"wide\.parquet: row group 0 takes at least .* of memory.*smaller row groups", said), said
        assert list(tmp_path.glob("runs/tiny/index/*")) == [], "not only when it is read"


def test_rows_that_teach_nothing_are_counted_and_the_rest_is_trained_on(tmp_path, monkeypatch):
    mistake = MISTAKES["answer"]
    arguments = prepare(mistake, tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = (tmp_path / "chat.jsonl").read_text()
    good = {"messages": [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]}
    (tmp_path / "chat.jsonl").write_text(rows + (json.dumps(good) + "\n") * 6)
    assert entry.main([*arguments, "train.max_steps=null", "train.num_epochs=1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    counts = [line["sources"]["chat"] for line in lines if line["kind"] == "data"][-1]
    assert counts["rows"] == 10
    assert sum(counts["rejected"].values()) == 4
