"""`ftlaunch prepare`: the same samples as from the rows themselves, by real Ray Data, then trained on by real ranks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
from forked import run_forked
from processes import environment, ftlaunch, run
from servers import moto_process
from tiny import chat_rows, recipe_for, text_rows, write_jsonl, write_recipe
from training import read_run

from ftlaunch.distributed import entry
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.distributed.indexing import eval_index, train_index
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.prepare import Preparation, encoder_digest, prepare_piece
from ftlaunch.distributed.row_encoder import RowEncoder, open_encoder, spec_of
from ftlaunch.launcher import cli
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.load import load_recipe
from ftlaunch.recipes.methods.table import build_method
from ftlaunch.recipes.schema import TrainSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rows of every kind: good ones, some too long, some with nothing to learn; three sources with a range of one."""
    folder = tmp_path_factory.mktemp("prepare")
    recipe = recipe_for(folder)
    long = [{"text": " ".join(["alpha beta"] * 90)}]
    silent = [{"messages": [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": " "}]}] * 3
    write_jsonl(folder / "chat.jsonl", chat_rows(80) + silent)
    write_jsonl(folder / "more.jsonl", text_rows(50, seed=3) + long)
    recipe["data"]["train"].append({"path": str(folder / "more.jsonl"), "weight": 0.2, "skip": 5})
    recipe["train"] |= {"max_steps": None, "num_epochs": 1}
    write_recipe(folder / "recipe.yaml", recipe)
    return folder


@pytest.fixture(scope="module")
def prepared(folder) -> tuple[Path, str]:
    """Where the shards are, and what was said."""
    code, said = run(ftlaunch("prepare", "recipe.yaml", "--to", "shards"), folder)
    assert code == 0, said
    return folder / "shards", said


def samples(path: Path, *values: str, evaluation: bool = False) -> Counter[tuple[bytes, bytes]]:
    """Every sample of a pass over each source: its tokens and what is supervised."""
    loaded = load_recipe(path, [*values, "data.packing=false", "train.num_epochs=1"], environ=environment())
    data = loaded.recipe.data
    indexed = eval_index(data) if evaluation else train_index(data)
    unweighted = [source.model_dump(exclude={"weight"}) for source in indexed.sources]
    train = tuple(map(TrainSource.model_validate, unweighted))
    recipe = loaded.recipe.model_copy(update={"data": data.model_copy(update={"train": train})})
    encode = open_encoder(spec_of(recipe, find_model(recipe.model.path), now=None))
    index = build_index(indexed.sources, indexed.names)
    stream = open_stream(
        index=index, recipe=recipe, world_rank=0, world_size=1, streams=8, encode=encode,
        collate=build_method(recipe.method).collate,
    )  # fmt: skip
    found: Counter[tuple[bytes, bytes]] = Counter()
    while (step := stream.next_step()).num_bins:
        for micro in step.micro_batches:
            for ids, targets, rows in zip(micro.batch.input_ids, micro.batch.targets, micro.batch.rows, strict=True):
                if rows:
                    # Padding may differ with the neighbours; it is token 0 that nothing is learned from.
                    found[np.trim_zeros(ids, "b").tobytes(), np.trim_zeros(targets + 100, "b").tobytes()] += 1
    stream.close()
    return found


def test_the_samples_are_those_of_the_rows(folder, prepared):
    shards, said = prepared
    raw = samples(folder / "recipe.yaml")
    assert samples(folder / "recipe.prepared.yaml") == raw
    assert sum(raw.values()) > 160
    assert samples(shards / "recipe.yaml", evaluation=True) == samples(folder / "recipe.yaml", evaluation=True)
    counts = json.loads((shards / "prepared.json").read_text())["sources"]
    assert counts["train/chat"]["rows"] == 83
    assert counts["train/chat"]["rejected/empty answer: no assistant turn says anything"] == 3
    assert counts["train/more"]["rows"] == 46  # 51, of which 5 are skipped
    assert counts["train/more"]["split"] > 1
    assert "empty answer" in said
    assert "train on it: ftlaunch" in said


def test_two_ranks_train_on_it(folder, prepared):
    arguments = ["recipe.prepared.yaml", "name=on-tokens", "train.num_epochs=null", "train.max_steps=6"]
    code, said = run_forked(2, arguments, folder)
    assert code == 0, said
    assert len(read_run(folder / "runs/on-tokens").losses) == 6


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> str:
    """An empty one, for this process and those it starts."""
    with moto_process(tmp_path) as port:
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="acme")
        yield "s3://acme"


def test_shards_in_a_bucket_give_the_same_losses_at_one_and_two_ranks(folder, bucket):
    write_recipe(folder / "bucket.yaml", json.loads((folder / "recipe.yaml").read_text()))
    code, said = run(ftlaunch("prepare", "bucket.yaml", "--to", f"{bucket}/shards"), folder)
    assert code == 0, said
    values = [str(folder / "bucket.prepared.yaml"), "train.num_epochs=null", "train.max_steps=6"]
    code, said = run_forked(2, [*values, "name=two"], folder)
    assert code == 0, said
    assert entry.main([*values, "name=one"]) == 0
    one, two = (read_run(folder / "runs" / name) for name in ("one", "two"))
    sources = load_recipe(folder / "bucket.prepared.yaml", environ={}).recipe.data.train
    assert {(source.format, source.path.rpartition("/train/")[0]) for source in sources} == {
        ("tokenized", f"{bucket}/shards")
    }
    assert [step["tokens"] for step in two.steps] == [step["tokens"] for step in one.steps]
    assert two.losses == pytest.approx(one.losses, rel=1e-6)  # sums in another order
    assert len(set(one.losses)) == 6


def test_what_is_there_is_kept_and_what_is_missing_made(folder, prepared):
    shards, _ = prepared
    files = sorted(shards.glob("*/*/*.parquet"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    files[0].unlink()
    code, said = run(ftlaunch("prepare", "recipe.yaml", "--to", "shards"), folder)
    assert code == 0, said
    assert {path: path.read_bytes() for path in files} == {path: content for path, (_, content) in before.items()}
    assert [path for path in files if path.stat().st_mtime_ns != before[path][0]] == files[:1]


def test_a_share_that_is_held_out_is_prepared_apart(folder):
    recipe = json.loads((folder / "recipe.yaml").read_text())
    recipe["data"]["eval"] = {"fraction": 0.3}
    cluster = {"type": "slurm", "partition": "gpus", "gpus_per_node": 8}
    sections = {"adapter": {"type": "lora"}, "strategy": {"type": "fsdp"}, "cluster": cluster}
    recipe |= sections
    path = write_recipe(folder / "split.yaml", recipe)
    (folder / "clusters").mkdir()
    (folder / "clusters/here.yaml").write_text("type: local\n")
    code, said = run(ftlaunch("prepare", "split.yaml", "--to", "split-shards", "--cluster", "here"), folder)
    assert code == 0, said
    kept, held_out = (samples(folder / "split.prepared.yaml", evaluation=which) for which in (False, True))
    assert kept == samples(path)
    assert not kept.keys() & held_out.keys()
    assert sum(held_out.values()) > 20
    before, after = (load_recipe(folder / name, environ={}).recipe for name in ("split.yaml", "split.prepared.yaml"))
    assert [getattr(after, name) for name in sections] == [getattr(before, name) for name in sections]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data.sequence_length=48", "was prepared for data.sequence_length 64, and the recipe says 48"),
        ("method.train_on=all", "was prepared with another tokenizer, chat template or method"),
    ],
)
def test_another_recipe_is_refused(folder, prepared, change, says):
    code, said = run_forked(1, ["recipe.prepared.yaml", "name=other", change], folder)
    assert code == 1
    assert says in said
    code, said = run(ftlaunch("prepare", "recipe.yaml", change, "--to", str(prepared[0])), folder)
    assert code == 1, said


def preparation_of(folder: Path, recipe: Path, *changes: str) -> tuple[Preparation, RowEncoder]:
    """What `ftlaunch prepare` would make into `folder`/shards."""
    loaded = load_recipe(recipe, changes, environ=environment()).recipe
    encode = open_encoder(spec_of(loaded, find_model(loaded.model.path), now=None))
    train, held_out = (
        build_index(one.sources, one.names) for one in (train_index(loaded.data), eval_index(loaded.data))
    )
    return Preparation(loaded.data, train, held_out, encoder_digest(encode), str(folder / "shards")), encode


def test_only_what_a_shard_holds_is_held_against_it(folder, prepared):
    before = {path: path.stat().st_mtime_ns for path in (folder / "shards").rglob("*.parquet")}
    recipe = json.loads((folder / "recipe.yaml").read_text())
    recipe["data"]["train"].append({"path": str(write_jsonl(folder / "new.jsonl", text_rows(9))), "weight": 0.3})
    larger = write_recipe(folder / "larger.yaml", recipe)
    changes = ["data.train.0.weight=0.1", "data.train.0.repeat=false", "data.train.1.num_epochs=2.5"]
    changed, encode = preparation_of(folder, larger, *changes, "data.train.2.primary=true")
    elsewhere = [source.model_copy(update={"storage_options": {"anon": True}}) for source in changed.data.train]
    changed = replace(changed, data=changed.data.model_copy(update={"train": tuple(elsewhere)}))
    made = {piece.folder: prepare_piece(changed, piece, encode).nbytes for piece in changed.pieces()}
    assert made.keys() == {"train/chat", "train/text", "train/more", "train/new", "eval/chats"}
    after = {path: path.stat().st_mtime_ns for path in (folder / "shards").rglob("*.parquet")}
    assert {path: after[path] for path in before} == before
    assert [path.parent.name for path in after.keys() - before.keys()] == ["new"]

    refused = set()
    other, encode = preparation_of(folder, folder / "recipe.yaml", "data.train.2.skip=6")
    for piece in other.pieces():
        try:
            prepare_piece(other, piece, encode)
        except UserError as error:
            assert "was prepared from other rows" in str(error)
            refused.add(piece.folder)
    assert refused == {"train/more"}


def test_mistakes_are_named_together(tmp_path, capsys):
    recipe = recipe_for(tmp_path)
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", chat_rows(3))
        with (tmp_path / f"{name}.jsonl").open("a") as lines:
            lines.write("{broken\n")
    recipe["data"]["train"] = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("one", "two")]
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    (tmp_path / "recipe.prepared.yaml").write_text("name: mine\n")
    assert cli.main(["prepare", str(path), "--to", str(tmp_path / "shards")]) == 1
    assert "`ftlaunch prepare` did not make it" in capsys.readouterr().err
    (tmp_path / "recipe.prepared.yaml").unlink()
    code, said = run(ftlaunch("prepare", str(path), "--to", "shards"), tmp_path)
    assert code == 1
    assert "one.jsonl, line 4: not valid JSON" in said
    assert "two.jsonl, line 4: not valid JSON" in said
    assert "Traceback" not in said
