"""Secrets that paths hold are in no log of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import chat_rows, recipe_for, write_jsonl

from ftlaunch.distributed import entry
from ftlaunch.recipes.errors import UserError

SECRET = "hunter2secret"


class Heard:
    """Keeps what a rank says."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def emit(self, event: object) -> None:
        self.events.append(repr(event))

    def stop_requested(self) -> bool:
        return False


def texts(run: Path) -> dict[str, str]:
    """What a user shares or prints: everything but the index, which has to name the files."""
    names = (path for path in run.rglob("*.json*") if path.is_file() and "index" not in path.relative_to(run).parts)
    return {str(path.relative_to(run)): path.read_text() for path in [*names, run / "recipe.yaml"]}


def test_rejected_rows_and_errors_do_not_show_a_secret(tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": "?"}]}, *chat_rows(20)]
    path = write_jsonl(tmp_path / SECRET / "chat.jsonl", rows)
    recipe = recipe_for(tmp_path, data={"train": [{"path": str(path), "format": "chat"}]}, train={"max_steps": 3})
    monkeypatch.setenv("STORE_TOKEN", SECRET)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe).replace(SECRET, "${STORE_TOKEN}"))
    loaded = entry.load_recipe(str(file), (), environ={"STORE_TOKEN": SECRET})
    heard = Heard()
    entry.run_rank(entry.Job(loaded, entry.World(), "", heard, ("test", f"data.train.0.path={path}")))
    run = tmp_path / "runs" / "tiny"
    events = (run / "events.jsonl").read_text()
    assert "rejected_rows" in events
    assert "REDACTED" in events
    write_jsonl(path, [{"messages": "nothing"}] * 30)
    loaded = entry.load_recipe(str(file), ("name=other",), environ={"STORE_TOKEN": SECRET})
    with pytest.raises(UserError, match=SECRET):
        entry.run_rank(entry.Job(loaded, entry.World(), "", heard, ("test", f"data.train.0.path={path}")))
    for run in (tmp_path / "runs").iterdir():
        assert [name for name, text in texts(run).items() if SECRET in text] == []
    assert [event for event in heard.events if SECRET in event] == []
