"""Data, model and run in Google Cloud Storage, through gcsfs and the store's own protocol on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import ForkedRanks, run_forked
from servers import gcs_process
from tiny import recipe_for, write_recipe
from training import read_run
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import storage
from ftlaunch.launcher import cli
from ftlaunch.recipes.errors import UserError

BUCKET = "gs://acme"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[None]:
    """A store with an empty bucket, for this process and those it starts."""
    with gcs_process(tmp_path_factory.mktemp("gcs"), "acme") as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks the real store what kind a bucket is
        yield


def test_files_are_written_listed_read_and_found_changed(store):
    url = f"{BUCKET}/wörk space/a b.bin"
    storage.write_bytes(url, b"0123456789")
    assert storage.read_range(url, 3, 7) == b"3456"
    (file,) = storage.list_files(f"{BUCKET}/wörk space")
    assert [file] == storage.list_files(f"{BUCKET}/wörk space/*.bin") == storage.list_files(url)
    assert (file, file.size) == (storage.info(url), 10)
    assert storage.read_file(file, 2, 5) == b"234"
    storage.write_bytes(url, b"9876543210")
    with pytest.raises(UserError, match="changed while it was read"):
        storage.read_file(file)
    with storage.open_write(f"{BUCKET}/big") as opened:
        for letter in b"abc":
            opened.write(bytes([letter]) * 3 * 2**20)
    assert storage.read_range(f"{BUCKET}/big", 3 * 2**20 - 1, 3 * 2**20 + 1) == b"ab"
    storage.delete_tree(f"{BUCKET}/wörk space")
    assert not storage.exists(url)
    assert storage.list_files(f"{BUCKET}/nothing") == []


def test_a_commit_is_created_once(store):
    url = f"{BUCKET}/commits/step-1.json"
    assert storage.create_exclusive(url, b"first")
    assert not storage.create_exclusive(url, b"second")
    assert storage.read_bytes(url) == b"first"


def test_killed_and_resumed_in_a_bucket(store, tmp_path, monkeypatch, capsys):
    """The same weights as a run on a disk that nobody killed."""
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(tmp_path, name="bot", train={"max_steps": 8})
    recipe["checkpoint"] = {"path": "runs", "every_steps": 2}
    code, output = run_forked(2, [str(write_recipe(tmp_path / "local.yaml", recipe))], tmp_path)
    assert code == 0, output
    for path in [*tmp_path.glob("*.*"), *(tmp_path / "model").iterdir()]:
        storage.write_bytes(f"{BUCKET}/{path.relative_to(tmp_path)}", path.read_bytes())
    for source in [*recipe["data"]["train"], *recipe["data"]["eval"]]:
        source["path"] = f"{BUCKET}/{Path(source['path']).name}"
    recipe["model"]["path"], recipe["checkpoint"]["path"] = f"{BUCKET}/model", f"{BUCKET}/runs"
    arguments = [str(write_recipe(tmp_path / "remote.yaml", recipe))]
    first = ForkedRanks(2, arguments, tmp_path)
    assert first.wait_until(partial(storage.exists, f"{BUCKET}/runs/bot/commits/step-000002.json")), first.text
    first.kill()
    code, output = run_forked(2, arguments, tmp_path)
    assert code == 0, output
    assert "continuing run bot from step" in output
    assert cli.main(["pull", f"{BUCKET}/runs/bot", "pulled"]) == 0
    capsys.readouterr()
    one, other = weights(read_run(tmp_path / "runs/bot").checkpoint), weights(tmp_path / "pulled")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    return state
