"""Fetching ahead: the real hub client on a hub on loopback, and then a run that reaches nothing outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub import Hub, serving
from processes import ftlaunch, rank_alone, run
from ruamel.yaml import YAML
from tiny import chat_rows, make_model, make_tokenizer, recipe_for, text_rows, write_jsonl, write_parquet, write_recipe
from training import read_run, train

from ftlaunch.distributed.storage import FileInfo
from ftlaunch.launcher.download.fetch import fetch_files
from ftlaunch.launcher.download.ledger import NAME, Downloads
from ftlaunch.launcher.download.wanted import WantedFile, is_outside, model_place, place_of, wanted_sources
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


def asked_for_bytes(hub: Hub) -> list[str]:
    """Requests for files that a run needs (`datasets` also asks for scripts and cards, which are not there)."""
    needed = (".safetensors", ".parquet", "config.json", "tokenizer.json")
    return [path for path in hub.asked if "/resolve/" in path and path.endswith(needed)]


def test_a_run_behind_no_door_trains_as_on_the_files_themselves(hub: Hub, tmp_path):
    make_tokenizer(tmp_path / "model")
    make_model(tmp_path / "model", seed=5)
    texts = [write_parquet(tmp_path / f"train-{n}.parquet", text_rows(30, seed=n)) for n in (0, 1)]
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_rows(30))
    recipe = recipe_for(tmp_path, train={"max_steps": 3}, checkpoint={"every_steps": None})
    sources = [
        {"path": [str(path) for path in texts], "format": "text", "name": "texts"},
        {"path": str(chats), "format": "chat", "name": "chats", "overlong": "truncate_right"},
    ]
    recipe["data"] |= {"train": sources, "eval": []}
    here = train({**recipe, "name": "here"}, 1)

    commit = hub.push("acme/tiny", tmp_path / "model")
    pushed = {f"data/train-0000{n}-of-00002.parquet": path.read_bytes() for n, path in enumerate(texts)}
    data_commit = hub.push("acme/texts", {**pushed, "data/test-0.parquet": b"never fetched"})
    recipe["model"]["path"] = "acme/tiny"
    recipe["data"]["train"][0] = {"path": "hub:acme/texts", "split": "train", "format": "text", "name": "texts"}
    write_recipe(tmp_path / "bot.yaml", {**recipe, "name": "bot"})
    variables = {**hub.environment(tmp_path / "home"), "HF_DATASETS_OFFLINE": "0"}
    code, said = run(ftlaunch("download", "bot.yaml", "--to", "shared"), tmp_path, variables)
    assert code == 0, said
    flat = " ".join(said.split())
    size = sum(path.stat().st_size for path in texts)
    assert f"model.path: {tmp_path}/shared/models/acme--tiny@{commit}" in flat
    assert f"data.train.0.path: 2 files below {tmp_path}/shared/data" in flat
    assert "train on it" in flat and "ftlaunch bot.downloaded.yaml" in flat
    assert not any("test-0" in path for path in hub.asked)
    made = YAML(typ="safe").load(tmp_path / "bot.downloaded.yaml")
    assert [Path(path).name for path in made["data"]["train"][0]["path"]] == [Path(name).name for name in pushed]
    assert all(data_commit in path for path in made["data"]["train"][0]["path"])
    assert made["data"]["train"][1]["path"] == str(chats)
    fetched = json.loads((tmp_path / "shared" / NAME).read_text())["files"]
    assert sum(file["size"] for place, file in fetched.items() if place.startswith("data/")) == size

    hub.asked.clear()
    code, said = run(ftlaunch("download", "bot.yaml", "--to", "shared"), tmp_path, variables)
    assert code == 0, said
    assert "nothing to fetch; " in said
    assert asked_for_bytes(hub) == []

    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    hub.asked.clear()
    code, said = run(rank_alone("bot.downloaded.yaml"), tmp_path, nowhere)
    assert code == 0, said
    assert hub.asked == []
    assert read_run(tmp_path / "runs/bot").losses == here.losses

    hub.push("acme/texts", {**pushed, "data/train-00001-of-00002.parquet": texts[0].read_bytes()})
    code, said = run(ftlaunch("download", "bot.yaml", "--to", "shared"), tmp_path, variables)
    assert code == 0, said
    assert "fetched 2 files" in said  # of the new commit; the old one's stay for runs that began on them
    assert len(list((tmp_path / "shared/data").rglob("*.parquet"))) == 4


def test_a_run_streams_from_the_hub_and_keeps_the_commit_that_it_began_on(hub: Hub, tmp_path):
    constant = {"max_steps": 4, "lr_scheduler": "constant", "warmup_ratio": 0.0}  # the same whenever the run ends
    recipe = recipe_for(tmp_path, train=constant, checkpoint={"every_steps": None})
    texts = [write_parquet(tmp_path / f"train-{n}.parquet", text_rows(30, seed=n)) for n in (0, 1)]
    source = {"format": "text", "name": "texts"}
    recipe["data"] |= {"train": [{**source, "path": [str(path) for path in texts]}], "eval": []}
    here = train({**recipe, "name": "here"}, 1)

    pushed = {f"data/train-0000{n}-of-00002.parquet": path.read_bytes() for n, path in enumerate(texts)}
    commit = hub.push("acme/streamed", pushed)
    recipe["data"]["train"] = [{**source, "path": "hub:acme/streamed"}]
    write_recipe(tmp_path / "bot.yaml", {**recipe, "name": "bot"})
    variables = {**hub.environment(tmp_path / "home"), "HF_DATASETS_OFFLINE": "0"}
    code, said = run(rank_alone("bot.yaml", "train.max_steps=2"), tmp_path, variables)
    assert code == 0, said
    hub.push("acme/streamed", {**pushed, "data/train-00001-of-00002.parquet": texts[0].read_bytes()})
    hub.asked.clear()
    code, said = run(rank_alone("bot.yaml"), tmp_path, variables)
    assert code == 0, said
    assert "changed" not in said
    read = asked_for_bytes(hub)
    assert read and all(f"/resolve/{commit}/" in path for path in read)
    assert read_run(tmp_path / "runs/bot").losses == here.losses


def test_errors_are_those_of_a_run(hub: Hub, tmp_path):
    recipe = recipe_for(tmp_path)
    recipe["model"]["path"] = "acme/nothing"
    write_recipe(tmp_path / "bot.yaml", recipe)
    code, said = run(ftlaunch("download", "bot.yaml"), tmp_path, hub.environment(tmp_path / "home"))
    assert code == 1
    assert "no model of that name on the hub" in " ".join(said.split())
    (tmp_path / "bot.downloaded.yaml").write_text("name: mine\n")
    code, said = run(ftlaunch("download", "bot.yaml"), tmp_path, hub.environment(tmp_path / "home"))
    assert code == 1
    assert "`ftlaunch download` did not make it" in " ".join(said.split())


# --- without a hub ----------------------------------------------------------------------------------------------------


def memory_file(name: str, data: bytes) -> WantedFile:
    import fsspec

    fsspec.filesystem("memory").pipe_file(f"/{name}", data)
    from ftlaunch.distributed import storage

    found = storage.info(f"memory://{name}")
    return WantedFile(found.url, found.size, found.etag, f"data/memory/{name}")


def test_what_is_there_is_kept_and_what_broke_off_or_changed_is_fetched(tmp_path):
    files = [memory_file("a.jsonl", b"one\n"), memory_file("b.jsonl", b"two\n" * 1000), memory_file("c.jsonl", b"")]
    downloads = Downloads(tmp_path)
    said: list[str] = []
    counts = fetch_files(downloads, [*files, files[0]], said.append)
    assert (counts.files, counts.bytes, counts.kept_files) == (3, 4004, 0)
    assert len(said) == 3
    assert (tmp_path / "data/memory/b.jsonl").read_bytes() == b"two\n" * 1000
    (tmp_path / "data/memory/a.jsonl").write_bytes(b"on")  # torn
    again = [files[0], memory_file("b.jsonl", b"new\n" * 1000), files[2]]
    counts = fetch_files(Downloads(tmp_path), again, said.append)
    assert (counts.files, counts.kept_files) == (2, 1)
    assert (tmp_path / "data/memory/b.jsonl").read_bytes().startswith(b"new")
    counts = fetch_files(Downloads(tmp_path), again, said.append)
    assert (counts.files, counts.bytes, counts.kept_bytes) == (0, 0, 4004)
    assert list(tmp_path.rglob("*.unfinished")) == []


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(tmp_path):
    huge = WantedFile("memory://huge", 1 << 60, "e", "data/memory/huge")
    with pytest.raises(UserError, match="TiB are to come, and"):
        fetch_files(Downloads(tmp_path), [huge], print)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/acme/texts@0a1b/data/train-0.parquet", "s3://acme/a/b.parquet", "https://x.org/a.jsonl?v=1",
        "https://x.org/../../etc/passwd", "https://x.org/a b.jsonl", "/data/here.jsonl", "s3://acme/a/../b.parquet",
    ],
)  # fmt: skip
def test_places_are_below_the_folder_and_differ(url, tmp_path):
    place = place_of(url)
    assert place.startswith("data/")
    assert ".." not in place.split("/")
    assert (tmp_path / place).resolve().is_relative_to(tmp_path / "data")
    others = {"https://x.org/a.jsonl", "https://x.org/a_b.jsonl", "s3://acme/b.parquet", "https://x.org/etc/passwd"}
    assert place not in {place_of(other) for other in others}
    assert ".." not in model_place("../../x", "c").split("/")


def test_only_what_lies_outside_is_wanted(tmp_path):
    source = {"format": "text"}
    paths = ["hub:acme/texts", "rows.jsonl", "s3://acme/rows.jsonl", "https://x.org/a.jsonl"]
    recipe = Recipe.model_validate(
        {"name": "bot", "model": {"path": "m"}, "data": {"train": [{"path": path, **source} for path in paths]}}
    )

    def found(source, _key):
        return [FileInfo(f"{source.path}/x", 1, "e")]

    internet = [each.key for each in wanted_sources(recipe, everything=False, find=found)]
    assert internet == ["data.train.0", "data.train.3"]
    assert len(wanted_sources(recipe, everything=True, find=found)) == 3
    (tmp_path / "layout").mkdir()
    assert not is_outside(f"hub:{tmp_path}/layout", everything=True)
