"""Conversations with everything that rows may hold, through the commands: tools, calls, parts, documents, flags.

Every byte is a token here, so that what is learned can be counted by hand.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from chat_styles import source
from tiny import make_model, make_tokenizer, recipe_for, write_jsonl, write_parquet, write_recipe
from training import train
from transformers import AutoTokenizer

from ftlaunch.launcher import cli

ROWS = 5
TRAIN_ON = ("assistant", "last_assistant", "completion", "all")
TEMPLATE = source("qwen2.5", plain=True)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def parts(*texts: str) -> list[dict[str, str]]:
    """Content in parts."""
    return [{"type": "text", "text": text} for text in texts]


def call(arguments: Any) -> list[dict[str, Any]]:
    """A call of the tool."""
    return [{"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}]


def is_flagged(n: int) -> bool:
    """Whether the first answer of row n says that it is not to be learned."""
    return n % 2 == 0


def line(n: int) -> dict[str, Any]:
    """As JSON lines have it: contents of both kinds, arguments as an object, tools as objects."""
    flag = {"weight": 0} if is_flagged(n) else {}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi.", **flag},
        {"role": "user", "content": parts("What is ", f"{n} + 2?")},
        {"role": "assistant", "content": None, "tool_calls": call({"a": n, "b": 2})},
        {"role": "tool", "content": f"{n + 2}", "tool_call_id": "c"},
        {"role": "assistant", "content": parts(f"It is {n + 2}.")},
    ]
    return {"messages": messages, "tools": [ADD], "documents": [{"title": "Sums", "text": f"{n} is a number"}]}


def table_row(n: int) -> dict[str, Any]:
    """The same as tables have it: every content in parts, nulls for what is not there, free schemas as JSON text."""
    row = line(n)
    for message in row["messages"]:
        if isinstance(message["content"], str):
            message["content"] = parts(message["content"])
        if "tool_calls" in message:
            message["tool_calls"] = call(json.dumps({"a": n, "b": 2}))
    return {**row, "tools": json.dumps([ADD])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rich")
    make_model(folder / "model", max_position_embeddings=2048)
    make_tokenizer(folder / "model", vocab_size=259)  # bytes, and what ChatML needs
    (folder / "qwen.jinja").write_text(TEMPLATE)
    write_jsonl(folder / "lines.jsonl", [line(n) for n in range(ROWS)])
    write_parquet(folder / "table.parquet", [table_row(n) for n in range(ROWS, 2 * ROWS)], row_group_size=2)
    write_recipe(folder / "recipe.yaml", recipe(folder))
    return folder


def recipe(folder: Path) -> dict[str, Any]:
    """Both sources once, one row a sequence."""
    made = recipe_for(folder, train={"max_steps": None, "num_epochs": 1, "global_batch_size": 4})
    made["model"] = {"path": str(folder / "model"), "chat_template": str(folder / "qwen.jinja"), "dtype": "float32"}
    sources = [{"path": str(folder / name), "name": name} for name in ("lines.jsonl", "table.parquet")]
    made["data"] |= {"sequence_length": 2048, "packing": False, "train": sources, "eval": []}
    return {**made, "checkpoint": {"path": str(folder / "runs"), "every_steps": None}}


def tokens(tokenizer: Any, n: int) -> int:
    """Of a row, as transformers renders it; the document stands in front of the first question."""
    asked = f"[1] Sums\n{n} is a number\n\nHello."
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": f"What is {n} + 2?"},
        {"role": "assistant", "content": "", "tool_calls": call({"a": n, "b": 2})},
        {"role": "tool", "content": f"{n + 2}"},
        {"role": "assistant", "content": f"It is {n + 2}."},
    ]
    return len(tokenizer.apply_chat_template(messages, tools=[ADD], chat_template=TEMPLATE, return_dict=False))


def supervised(tokenizer: Any, n: int, train_on: str) -> int:
    """Of a row: bytes of what is learned, and for each turn the token that ends it."""
    called = f'<tool_call>\n{{"name": "add", "arguments": {{"a": {n}, "b": 2}}}}\n</tool_call>'
    turns = ["Hi.", called, f"It is {n + 2}."]
    if train_on == "all":  # but the first token, which nothing comes before, and the turn that says so
        return tokens(tokenizer, n) - 1 - (len("Hi.") + 1 if is_flagged(n) else 0)
    learned = {"assistant": turns[is_flagged(n) :], "last_assistant": turns[2:], "completion": turns[1:]}[train_on]
    return sum(len(turn) + 1 for turn in learned)


@pytest.mark.parametrize("train_on", TRAIN_ON)
def test_check_counts_what_is_learned(folder, train_on):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(["check", str(folder / "recipe.yaml"), "--json", f"method.train_on={train_on}"])
    assert code == 0, out.getvalue()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for first, found in zip((0, ROWS), json.loads(out.getvalue())["sources"], strict=True):
        rows = range(first, first + ROWS)
        assert (found["format"], found["samples"]) == ("chat", ROWS)
        assert found["tokens"] == sum(tokens(tokenizer, n) for n in rows)
        learned = sum(supervised(tokenizer, n, train_on) for n in rows)
        assert found["supervised_share"] == pytest.approx(learned / found["tokens"], abs=1e-12)


def test_a_run_learns_the_same(folder):
    run = train(recipe(folder), 2)
    assert len(run.steps) >= 2
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = range(2 * ROWS)
    assert run.steps[-1]["tokens"] == sum(tokens(tokenizer, n) for n in rows)
    learned = sum(supervised(tokenizer, n, "assistant") for n in rows)
    assert sum(step["supervised_tokens"] for step in run.steps) == learned
