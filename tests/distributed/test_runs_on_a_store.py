"""What a whole run moves that starts from an object store, saves there and resumes from there: counted by the bytes of
a real S3 protocol."""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from harness import run_distributed
from safetensors.numpy import load_file
from servers import moto_process
from tiny import make_model, recipe_for
from training import STRATEGIES, QuietMonitor, world_of

from ftlaunch.distributed import entry, storage
from ftlaunch.distributed.checkpoint.reader import CheckpointReader, read_whole
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

ONCE = 1.05
"""Of the tensors' bytes: headers are read by every rank."""

FROZEN = "model.embed_tokens.weight"


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In front of an S3 server with the bucket "store"; it spoils nothing."""
    with moto_process(tmp_path) as port:
        found = FaultyProxy("127.0.0.1", port)
        settings = {"ENDPOINT_URL": found.url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
        for name, value in {**settings, "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        # moto hands the checksum of an upload's parts on to a copy as if it were that of its bytes (5.x: copy_object
        # in s3/models.py takes over checksum_value without checksum_type); ours are checked below.
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        put(found, "store", b"")
        yield found
        found.stop()


def put(proxy: FaultyProxy, path: str, data: bytes) -> None:
    kind = {"Content-Type": "application/octet-stream"}  # else the server looks for the fields of a form in it
    urllib.request.urlopen(urllib.request.Request(f"{proxy.url}/{path}", data, kind, method="PUT")).close()


def moved(counts: Counter[str], folder: str) -> int:
    """Bytes of tensors in a folder of the bucket."""
    return sum(size for path, size in counts.items() if folder in path and path.endswith(".safetensors"))


def start(rank: int, size: int, recipe: dict[str, Any], rendezvous: str) -> None:
    """Two ranks of one node."""
    loaded = LoadedRecipe(Recipe.model_validate(recipe), "test.yaml", (), ())
    entry.run_rank(entry.Job(loaded, world_of(rank, [size]), f"file://{rendezvous}", QuietMonitor(), ("test",)))


def stored(_rank: int, _size: int, directory: str) -> tuple[int, str, np.ndarray]:
    """Bytes of a checkpoint's tensors, the file of the frozen one, and its values. In a process of its own: clients of
    object stores do not like to be forked."""
    assert verify_checkpoint(directory) == []
    reader = CheckpointReader(directory)
    size = sum(file.size for file in storage.list_files(directory, [".safetensors"]))
    return size, reader.files.places[FROZEN][0].name, read_whole(reader, FROZEN).numpy().copy()


def test_a_node_reads_each_byte_once_and_the_store_copies_what_is_frozen(tmp_path, proxy):
    """Every rank needs all weights under `ddp`. Two saves of the first start, of which the second does not send the
    frozen embeddings again; a second start, which resumes from it."""
    model = make_model(tmp_path / "large", vocab_size=4_099, hidden_size=168, num_hidden_layers=2)
    for path in model.iterdir():
        put(proxy, f"store/model/{path.name}", path.read_bytes())
    settings: dict[str, Any] = {
        "model": {"path": "s3://store/model", "train_layers": ["model.layers.1.*", "lm_head*"]},
        "strategy": STRATEGIES["ddp"],
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"path": "s3://store/runs", "every_steps": 1, "keep_last": 9, "keep_training_state": 9},
    }
    recipes = [recipe_for(tmp_path, train={"max_steps": steps}, **settings) for steps in (2, 3)]
    weights = (model / "model.safetensors").stat().st_size
    directory = "s3://store/runs/tiny/step-00000{}.a1"

    proxy.sent.clear()
    proxy.received.clear()
    run_distributed(start, 2, recipes[0], str(tmp_path / "first"), connect=False)
    assert 0.99 <= moved(proxy.sent, "/store/model/") / weights <= ONCE
    [(size, name, first)] = run_distributed(stored, 1, directory.format(1), connect=False)
    [(_, again, second)] = run_distributed(stored, 1, directory.format(2), connect=False)
    published = load_file(model / "model.safetensors")[FROZEN]
    assert np.array_equal(first, published) and np.array_equal(second, published)
    assert name == again
    saved = [proxy.received[f"/store/runs/tiny/step-00000{step}.a1/{name}"] for step in (1, 2)]
    assert saved[0] >= first.nbytes and saved[1] == 0, "the store makes the copy"

    proxy.sent.clear()
    run_distributed(start, 2, recipes[1], str(tmp_path / "second"), connect=False)
    assert 0.99 <= moved(proxy.sent, "/step-000002.a1/") / size <= ONCE
    assert moved(proxy.sent, "/store/model/") <= (ONCE - 1) * weights
    assert moved(proxy.sent, "/step-000001.a1/") == 0
