"""The mistakes that users make, once: tests make each and look at the answer, and `docs/mistakes.md` shows them.

Each prepares a folder that holds a good recipe with its data and model, and says what is run there.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import chat_rows, recipe_for, write_jsonl, write_parquet, write_recipe

Recipe = dict[str, Any]


@dataclass(frozen=True)
class Mistake:
    """`make(folder, recipe)` breaks something; `arguments` follow the recipe's file; the answer holds all `says`."""

    title: str
    make: Callable[[Path, Recipe], None]
    says: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    exit_code: int = 1
    before_ranks: bool = False
    """Found by the command line itself, before a rank is started."""


def prepare(mistake: Mistake, folder: Path) -> list[str]:
    """Make the mistake in `folder`; what to give to the command."""
    recipe = recipe_for(folder)
    recipe["data"]["train"] = [{"path": "chat.jsonl", "format": "chat"}]
    recipe["data"]["eval"] = []
    recipe["model"]["path"] = "model"
    recipe["checkpoint"] = {"path": "runs"}
    mistake.make(folder, recipe)
    write_recipe(folder / "recipe.yaml", recipe)
    return ["recipe.yaml", *mistake.arguments]


def nothing(_folder: Path, _recipe: Recipe) -> None:
    """The mistake is on the command line."""


def train_path(path: str, **more: Any) -> Callable[[Path, Recipe], None]:
    """Other training data."""

    def make(_folder: Path, recipe: Recipe) -> None:
        recipe["data"]["train"] = [{"path": path, **more}]

    return make


def other_column(folder: Path, recipe: Recipe) -> None:
    write_parquet(folder / "other.parquet", [{"conversation": row["messages"]} for row in chat_rows(5)])
    recipe["data"]["train"] = [{"path": "other.parquet", "format": "chat"}]


def broken_line(folder: Path, _recipe: Recipe) -> None:
    lines = [json.dumps(row) for row in chat_rows(9)]
    lines[4] = lines[4][:-9]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")


def no_utf8(folder: Path, _recipe: Recipe) -> None:
    lines = [json.dumps(row).encode() for row in chat_rows(9)]
    lines[6] = lines[6].replace(b"eta", b"\xff\xfe", 1)
    (folder / "chat.jsonl").write_bytes(b"\n".join(lines))


def an_image(folder: Path, _recipe: Recipe) -> None:
    rows = chat_rows(9)
    text = {"type": "text", "text": "What is this?"}
    rows[2]["messages"][0]["content"] = [text, {"type": "image_url", "image_url": {"url": "cat.png"}}]
    write_jsonl(folder / "chat.jsonl", rows)


def cut_gzip(folder: Path, recipe: Recipe) -> None:
    body = "".join(json.dumps(row) + "\n" for row in chat_rows(99)).encode()
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(body)[:-50])
    recipe["data"]["train"] = [{"path": "more.jsonl.gz"}]


def cut_parquet(folder: Path, recipe: Recipe) -> None:
    path = write_parquet(folder / "rows.parquet", chat_rows(9))
    path.write_bytes(path.read_bytes()[:-20])
    recipe["data"]["train"] = [{"path": "rows.parquet"}]


def mixed_schemas(folder: Path, recipe: Recipe) -> None:
    write_parquet(folder / "shards/one.parquet", [{"text": "alpha"}])
    write_parquet(folder / "shards/two.parquet", [{"text": 7}])
    recipe["data"]["train"] = [{"path": "shards"}]


def empty_file(folder: Path, recipe: Recipe) -> None:
    (folder / "empty.jsonl").write_text("")
    recipe["data"]["train"] = [{"path": "empty.jsonl"}]


def all_held_out(_folder: Path, recipe: Recipe) -> None:
    recipe["data"]["eval"] = {"fraction": 0.999999}


def preferences(folder: Path, recipe: Recipe) -> None:
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "alpha?", "chosen": "beta", "rejected": "eta"}] * 3)
    recipe["data"]["train"] = [{"path": "pairs.jsonl"}]


def empty_answers(folder: Path, _recipe: Recipe) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}] * 4
    write_jsonl(folder / "chat.jsonl", rows)


def endless_prompts(folder: Path, recipe: Recipe) -> None:
    recipe["data"]["overlong"] = "truncate_right"
    messages = [{"role": "user", "content": "alpha " * 500}, {"role": "assistant", "content": "beta"}]
    write_jsonl(folder / "chat.jsonl", [{"messages": messages}] * 4)


def no_weights(folder: Path, _recipe: Recipe) -> None:
    (folder / "model" / "model.safetensors").unlink()


def other_shapes(folder: Path, _recipe: Recipe) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))


def no_folder_for_runs(folder: Path, _recipe: Recipe) -> None:
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "runs").write_text("a file where the folder should be")


def unknown_key(_folder: Path, recipe: Recipe) -> None:
    recipe["train"]["per_device_train_batch_size"] = 4
    recipe["train"]["learning_rte"] = 1e-5
    recipe["data"]["packing"] = "yes please"


def too_fast(_folder: Path, recipe: Recipe) -> None:
    recipe["train"] |= {"learning_rate": 1e30, "max_grad_norm": None}


MISTAKES = {
    "keys": Mistake(
        "Unknown keys and a wrong type, all at once",
        unknown_key,
        ("per_device_train_batch_size", "train.micro_batch_size", "learning_rte", "learning_rate", "packing"),
        before_ranks=True,
    ),
    "recipe": Mistake("A recipe that is not there", lambda f, r: None, ("recpie.yaml",), before_ranks=True),
    "file": Mistake(
        "Data that is not there",
        train_path("chats.jsonl", format="chat"),
        ("recipe.yaml:", "data.train.0.path", "chats.jsonl", "Did you mean chat.jsonl?"),
        before_ranks=True,
    ),
    "glob": Mistake(
        "A glob that matches nothing",
        train_path("data/*.parquet", format="chat"),
        ("data/*.parquet",),
        before_ranks=True,
    ),
    "column": Mistake(
        "A parquet file without the column",
        other_column,
        ("other.parquet", "messages", "conversation", "columns"),
        before_ranks=True,
    ),
    "line": Mistake("A broken JSON line", broken_line, ("chat.jsonl", "line 5")),
    "utf8": Mistake("A line that is no UTF-8", no_utf8, ("chat.jsonl, line 7", "not valid UTF-8")),
    "image": Mistake(
        "A message with an image", an_image, ("chat.jsonl, line 3", "messages[0].content[1]", "image_url", "only text")
    ),
    "gzip": Mistake(
        "A compressed file that is cut off", cut_gzip, ("more.jsonl.gz", "cut off", "Write"), before_ranks=True
    ),
    "footer": Mistake(
        "A parquet file that is cut off", cut_parquet, ("rows.parquet", "cut off", "Write"), before_ranks=True
    ),
    "mixed": Mistake(
        "Files that do not belong together",
        mixed_schemas,
        ("'text' is text in", "one.parquet", "a number in", "two.parquet", "two sources"),
        before_ranks=True,
    ),
    "empty": Mistake("An empty file", empty_file, ("empty.jsonl", "0 bytes"), before_ranks=True),
    "format": Mistake(
        "Rows that the method does not learn from",
        preferences,
        ("pairs", "format preference", "method sft reads chat"),
        before_ranks=True,
    ),
    "weight": Mistake(
        "A weight of zero",
        train_path("chat.jsonl", format="chat", weight=0),
        ("recipe.yaml", "data.train.0.weight", "above 0"),
        before_ranks=True,
    ),
    "answer": Mistake(
        "Rows without an answer",
        empty_answers,
        ("no row gives anything to learn", "chat.jsonl", "row 0", "empty answer"),
    ),
    "held_out": Mistake(
        "A held-out part that leaves nothing to train on",
        all_held_out,
        ("no row gives anything to learn", "all rows are held out", "data.eval.fraction"),
    ),
    "prompt": Mistake(
        "Prompts that fill the sequence", endless_prompts, ("no row gives anything to learn", "row 0", "truncat")
    ),
    "weights": Mistake("A model folder without weights", no_weights, ("model", "safetensors"), before_ranks=True),
    "shapes": Mistake("Weights of other shapes", other_shapes, ("mlp", "shape", "52", "64")),
    "place": Mistake("An output place that cannot be written", no_folder_for_runs, ("runs",), before_ranks=True),
    "nodes": Mistake(
        "More GPUs than exist",
        nothing,
        ("GPU", "this machine has"),
        arguments=("cluster.gpus_per_node=64",),
        before_ranks=True,
    ),
    "nan": Mistake(
        "A loss that is no number", too_fast, ("step", "gradient norm nan", "train.learning_rate", "chat.jsonl", "row")
    ),
}
