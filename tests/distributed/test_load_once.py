"""What a node reads from an object store to start and to resume: each byte once at most, whatever the strategy; counted
by the server."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the ranks are forked
from harness import run_distributed
from safetensors.torch import load_file
from tiny import make_model, recipe_for
from training import STRATEGIES, train, world_of

import ftlaunch.distributed.strategies.deepspeed  # noqa: F401  as above
from ftlaunch.distributed.checkpoint.fragments import Fragment
from ftlaunch.distributed.checkpoint.reader import CheckpointReader
from ftlaunch.distributed.model import build_model
from ftlaunch.distributed.model_files import ModelFolder
from ftlaunch.distributed.node_share import NodeShare, shared_on_node
from ftlaunch.distributed.saver import load_parts
from ftlaunch.distributed.start_weights import load_weights  # noqa: F401  as above
from ftlaunch.distributed.strategies.table import prepare
from ftlaunch.distributed.world import World
from ftlaunch.recipes.schema import Recipe

SERVER = Path(__file__).resolve().parents[2] / "benchmarks" / "object_store.py"
ONCE = 1.05
"""Of the tensors' bytes: headers, indexes and small files are read by every rank."""

PARTS = ("master", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Path:
    """A model with tensors of several spans, and a checkpoint of it after a step."""
    folder = tmp_path_factory.mktemp("store") / "bucket"
    make_model(folder / "model", vocab_size=16_411, hidden_size=168, num_hidden_layers=2)
    model = {"path": str(folder / "model"), "dtype": "bfloat16"}
    run = train(recipe_for(folder.parent / "run", model=model, train={"max_steps": 1}, data={"eval": []}))
    run.checkpoint.rename(folder / "checkpoint")
    return folder


@pytest.fixture
def store(bucket, monkeypatch) -> Iterator[str]:
    """The address of a server over the bucket's parent, whose counts begin at nothing."""
    command = [sys.executable, str(SERVER), str(bucket.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        url = server.stdout.readline().strip()
        for name, value in {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield url
        server.kill()


def load_all(rank: int, size: int, settings: dict, names: list[str], url: str, nodes: list[int], bucket: Path) -> dict:
    """Each strategy starts from the model and resumes from the checkpoint in the bucket: bytes that the server has sent
    for each, and whether this rank holds the right values then."""
    world, found = world_of(rank, nodes), {}
    expected = {part: load_file(bucket / "checkpoint" / "training" / f"{part}.safetensors") for part in PARTS}
    for name in names:
        recipe = Recipe.model_validate({**settings, "strategy": STRATEGIES[name]})
        folder = ModelFolder("s3://bucket/model")
        built = build_model(recipe, folder)
        engine = prepare(built, recipe, world)
        before = sent(url)
        with shared_on_node(folder.url, world, f"{url} {name}") as share:
            engine.load_base(CheckpointReader(folder.url, share=share))
            dist.barrier()
        started = sent(url)
        with shared_on_node("s3://bucket/checkpoint", world, f"{url} {name}") as share:
            load_parts(engine, "s3://bucket/checkpoint", False, share)
            dist.barrier()
        held = [(part, fragment) for part in PARTS for fragment in engine.fragments(part)]
        is_equal = all(holds(fragment, expected[part][fragment.spec.name]) for part, fragment in held)
        found[name] = (started - before, sent(url) - started, is_equal)
        dist.barrier()
    return found


def holds(fragment: Fragment, whole: torch.Tensor) -> bool:
    flat = whole.flatten()
    return torch.equal(fragment.values.flatten(), torch.cat([flat[a:b] for a, b in fragment.ranges] or [flat[:0]]))


def sent(url: str) -> int:
    """Asked by every rank while all wait for each other."""
    dist.barrier()
    with urllib.request.urlopen(f"{url}/-/counts") as answer:
        count = json.load(answer)["bytes"]
    dist.barrier()
    return count


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("nodes", "names"),
    [([2], ["fsdp", "zero1", "zero3"]), ([4], ["ddp", "fsdp", "zero3"]), ([2, 2], ["ddp", "fsdp"])],
    ids=str,
)
def test_a_node_reads_each_byte_once(nodes, names, bucket, store):
    settings = recipe_for(bucket.parent / "run", model={"path": "s3://bucket/model", "dtype": "bfloat16"})
    ranks = run_distributed(load_all, sum(nodes), settings, names, store, nodes, bucket)
    model = weights_bytes(bucket / "model")
    resumed = weights_bytes(bucket / "checkpoint")
    for name in names:
        started, continued, _ = ranks[0][name]
        # A node whose ranks hold shards of a larger world reads those; `ddp` needs all of it on every node.
        copies = len(nodes) if name == "ddp" else 1
        assert copies * 0.99 <= started / model <= len(nodes) * ONCE, (name, started / model)
        assert copies * 0.99 <= continued / resumed <= len(nodes) * ONCE, (name, continued / resumed)
        assert all(rank[name][2] for rank in ranks)
    assert not list(Path(tempfile.gettempdir()).glob("ftlaunch-blocks-*/*.block"))


@pytest.mark.parametrize(
    ("strategy", "ranks", "least", "most", "most_checked"), [("ddp", 2, 1.9, 2.1, 2.1), ("fsdp", 4, 0.99, 1.25, 2.5)]
)
def test_without_sharing_a_rank_reads_what_it_needs(strategy, ranks, least, most, most_checked, bucket, store):
    """Under `ddp` that is all of it (what sharing saves, measured in the same way); under `fsdp` its shards, and whole
    blocks of small tensors, which are fetched with one request. Of a checkpoint whole chunks are read, because each has
    one checksum: 4 MiB, of which these tensors have three; four ranks that read all would read four times as much."""
    settings = recipe_for(bucket.parent / "run", model={"path": "s3://bucket/model", "dtype": "bfloat16"})
    [(started, resumed), *_] = run_distributed(load_alone, ranks, settings, strategy, store)
    assert least <= started / weights_bytes(bucket / "model") <= most
    assert least <= resumed / weights_bytes(bucket / "checkpoint") <= most_checked


def load_alone(rank: int, size: int, settings: dict, strategy: str, url: str) -> tuple[int, int]:
    """Bytes that all ranks read of the model, and of the checkpoint."""
    recipe = Recipe.model_validate({**settings, "strategy": STRATEGIES[strategy]})
    engine = prepare(build_model(recipe, ModelFolder("s3://bucket/model")), recipe, world_of(rank, [size]))
    before = sent(url)
    engine.load_base(CheckpointReader("s3://bucket/model"))
    started = sent(url)
    load_parts(engine, "s3://bucket/checkpoint", False)
    return started - before, sent(url) - started


def test_blocks_leave_when_there_is_no_more_room(tmp_path):
    """The least recently wanted first; one that is gone is fetched again, and one that is too large is not kept."""
    fetched = []

    def read(share: NodeShare, name: str, size: int = 40) -> bytes:
        def fetch() -> bytearray:
            fetched.append(name)
            return bytearray(name.encode() * size)

        return bytes(share.read(name, fetch))

    first, second = NodeShare(tmp_path, 100), NodeShare(tmp_path, 100, 0.5)
    assert read(first, "a") == read(second, "a") == b"a" * 40
    read(second, "b")
    read(first, "a")
    assert fetched == ["a", "b"]
    read(first, "c")
    assert read(second, "a") == b"a" * 40 and fetched == ["a", "b", "c"]
    assert read(second, "b") == b"b" * 40 and fetched == ["a", "b", "c", "b"]
    assert read(first, "large", 101) == read(second, "large", 101) and fetched[4:] == ["large", "large"]


def test_who_fails_leaves_the_block_to_the_next(tmp_path):
    def broken() -> bytearray:
        raise OSError("the network is gone")

    share = NodeShare(tmp_path, 100)
    with pytest.raises(OSError, match="gone"):
        share.read("a", broken)
    assert bytes(share.read("a", lambda: bytearray(b"whole"))) == b"whole"


@pytest.mark.parametrize(
    ("url", "ranks"), [("/somewhere/model", 8), ("file:///somewhere/model", 8), ("s3://bucket/model", 1)]
)
def test_nothing_is_shared_where_nothing_would_be_saved(url, ranks):
    with shared_on_node(url, World(size=ranks, local_size=ranks), "test") as share:
        assert share is None
