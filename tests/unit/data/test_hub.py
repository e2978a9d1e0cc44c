"""Data sets by name: the real `datasets` and the real hub client, on a folder and on a hub on loopback."""

from __future__ import annotations

import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import serving
from processes import run

from ftlaunch.distributed.data.build import build_index
from ftlaunch.launcher.plan_data import index_source
from ftlaunch.launcher.unknown import Unknown
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.naming import source_name
from ftlaunch.recipes.schema import Source

SUBSETS = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/one.jsonl}, {split: test, path: en/held-out.json}]
- config_name: de
  data_files: de.jsonl
---
"""


def parquet(texts):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer)
    return buffer.getvalue()


PLAIN = {
    "README.md": b"# Texts",
    "data/train-00000-of-00002.parquet": parquet(["a", "b"]),
    "data/train-00001-of-00002.parquet": parquet(["c"]),
    "data/test-00000-of-00001.parquet": parquet(["t"]),
}
WITH_SUBSETS = {
    "README.md": SUBSETS.encode(),
    "en/one.jsonl": b'{"text": "one"}\n',
    "en/held-out.json": b'{"text": "held out"}',
    "de.jsonl": '{"text": "zwölf"}\n'.encode(),
}


@pytest.fixture
def folder(tmp_path):
    def write(files):
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        return f"hub:{tmp_path}"

    return write


def texts(index):
    blocks = map(index.read_block, range(index.num_blocks))
    return [block.row(number)["text"] for block in blocks for number in range(block.num_rows)]


def texts_of(path, **options):
    return texts(build_index([Source(path=path, format="text", **options)], ["s"]))


def test_splits_and_subsets_of_a_folder_with_a_hub_layout(folder):
    path = folder(PLAIN)
    assert texts_of(path, split="train") == ["a", "b", "c"]
    assert texts_of(path, split="test") == ["t"]
    with pytest.raises(UserError, match=r"which split is meant\? It has: train, test\. Name one with `split:`"):
        texts_of(path)
    with pytest.raises(UserError, match="no split 'validation' It has: train, test"):
        texts_of(path, split="validation")


def test_subsets_that_a_readme_declares(folder):
    path = folder(WITH_SUBSETS)
    assert texts_of(path, subset="en", split="train") == ["one"]
    assert texts_of(path, subset="en", split="test") == ["held out"]
    assert texts_of(path, subset="de") == ["zwölf"], "the only split needs no name"
    with pytest.raises(UserError, match=r"en.*de.*named with `subset:`"):
        texts_of(path)
    with pytest.raises(UserError, match=r"'fr'.*en.*de"):
        texts_of(path, subset="fr")


READ = """
import json, sys
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.changes import find_changes
from ftlaunch.recipes.errors import FtlaunchError
from ftlaunch.recipes.schema import Source

def read(source):
    try:
        index = build_index([source], ["s"])
    except FtlaunchError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    blocks = [index.read_block(number) for number in range(index.num_blocks)]
    texts = [block.row(row)["text"] for block in blocks for row in range(block.num_rows)]
    changes = str(find_changes(index, [source]))
    return {"texts": texts, "files": [file.url for file in index.files], "changes": changes}

print(json.dumps([read(Source(format="text", **one)) for one in json.loads(sys.argv[1])]))
"""


def read(tmp_path, hub, *sources):
    """What a process of its own reads: the hub's address is looked at when its client is imported."""
    environment = {**hub.environment(tmp_path / "home"), "HF_DATASETS_OFFLINE": "0"}
    code, output = run([sys.executable, "-c", READ, json.dumps(sources)], tmp_path, environment)
    assert code == 0, output
    return json.loads(output.splitlines()[-1])


def test_a_hub_by_name_is_read_where_it_lies_and_pinned_to_its_commit(tmp_path):
    with serving() as hub:
        first = hub.push("acme/texts", PLAIN)
        (found,) = read(tmp_path, hub, {"path": "hub:acme/texts", "split": "train"})
        assert found["texts"] == ["a", "b", "c"]
        assert all(f"acme/texts@{first}/data/train" in url for url in found["files"])
        assert found["changes"] == ""
        hub.push("acme/texts", {**PLAIN, "data/test-00000-of-00001.parquet": parquet(["newer"])})
        newest, pinned, nothing = read(
            tmp_path,
            hub,
            {"path": "hub:acme/texts", "split": "test"},
            {"path": f"hub:acme/texts@{first}", "split": "test"},
            {"path": "hub:acme/nothing", "split": "train"},
        )
        assert (newest["texts"], pinned["texts"]) == (["newer"], ["t"])
        assert nothing["error"].startswith("UserError: hub:acme/nothing:")
        assert "HF_TOKEN" in nothing["error"]


def test_a_plan_does_not_ask_a_hub_and_a_name_gives_a_name():
    answer = index_source(Source(path="hub:acme/texts@main", split="train"), "texts")
    assert isinstance(answer, Unknown)
    assert "hub:acme/texts@main is on a hub" in str(answer)
    assert source_name(Source(path="hub:acme/texts@main")) == "texts"


def test_a_path_that_looks_like_a_name_is_told_how_to_name_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"If a data set of the Hugging Face hub is meant, write hub:acme/texts\."):
        texts_of("acme/texts")
    with pytest.raises(UserError) as error:
        texts_of("data/train.jsonl")
    assert "hub" not in str(error.value)
