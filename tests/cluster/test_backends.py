"""What holds for every kind of cluster: one recipe, unchanged but for `cluster:`, ends with the same weights, bit for
bit, and its rows are prepared to the same shards; running it again is decided alike; nothing is left running."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from cloud_site import CloudSite
from kube_operator import kubernetes_on
from processes import BIN, Command, ftlaunch, run
from slurm_site import Site
from ssh_hosts import Hosts
from tiny import recipe_for, write_recipe
from training import read_run, train

from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.indexing import eval_index, train_index
from ftlaunch.distributed.model_files import find_model
from ftlaunch.distributed.prepare import Preparation, encoder_digest, prepare_piece
from ftlaunch.distributed.row_encoder import open_encoder, spec_of
from ftlaunch.recipes.load import load_recipe

RANKS = 3
JOB = "FTLAUNCH_JOB"
STRANGE = 'it\'s $(touch pwned) & "so"'
"""A folder's name that no shell may see."""

Section = tuple[dict[str, Any], dict[str, str]]
"""A `cluster` section, and variables that its users have."""


@contextmanager
def local(_request: pytest.FixtureRequest) -> Iterator[Section]:
    yield {"type": "local", "processes_per_node": RANKS, "gpus_per_node": 0}, {}


@contextmanager
def ray(request: pytest.FixtureRequest) -> Iterator[Section]:
    """A head that somebody else has started."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    pattern = re.compile(r"--address='([^']+)'")
    folder = request.getfixturevalue("tmp_path_factory").mktemp("ray")
    with tempfile.TemporaryDirectory(prefix="r") as short:
        command = ["start", "--head", "--block", f"--num-cpus={RANKS}", "--port=0", "--include-dashboard=false"]
        head = Command([str(BIN / "ray"), *command, f"--temp-dir={short}"], folder, variables)
        assert head.wait_until(lambda: pattern.search(head.text) is not None), head.text
        address = pattern.search(head.text)[1]
        yield {"type": "ray", "address": address, "processes_per_node": RANKS, "gpus_per_node": 0}, variables
        head.kill()


@contextmanager
def ssh(request: pytest.FixtureRequest) -> Iterator[Section]:
    """Three hosts, one rank on each."""
    hosts: Hosts = request.getfixturevalue("hosts")
    yield hosts.cluster(env=["OMP_NUM_THREADS", "HF_HUB_*"]), {}
    assert {name: host.processes("ray") for name, host in hosts.members.items()} == {name: [] for name in hosts.names}


@contextmanager
def kubernetes(request: pytest.FixtureRequest) -> Iterator[Section]:
    """Three pods, one rank in each: what is rendered is accepted by the schemas, its commands run on three hosts."""
    place: Path = request.getfixturevalue("place")
    folder = request.getfixturevalue("tmp_path_factory").mktemp("kube")
    with kubernetes_on(request.getfixturevalue("hosts"), folder, place) as (served, _played):
        yield served.cluster(python=sys.executable, nodes=RANKS, volumes=[{"claim": "shared", "path": str(place)}]), {}
        left = [name for kind, name in served.kube.objects if kind in ("rayjobs", "rayclusters", "pods", "secrets")]
        assert left == []


@contextmanager
def slurm(request: pytest.FixtureRequest) -> Iterator[Section]:
    """Three nodes by sbatch, one rank on each."""
    site: Site = request.getfixturevalue("slurm")
    yield site.cluster(env=["OMP_NUM_THREADS", "HF_HUB_*"]), site.environ
    assert site.jobs() == []
    assert site.left() == {}


@contextmanager
def cloud(request: pytest.FixtureRequest) -> Iterator[Section]:
    """Three machines of EC2, one rank on each, made for the run; none is left."""
    site: CloudSite = request.getfixturevalue("cloud")
    place: Path = request.getfixturevalue("place")
    site.boots = True
    section = site.cluster(
        nodes=RANKS, python=sys.executable, shared_paths=[str(place)], env=["OMP_NUM_THREADS", "HF_HUB_*"]
    )
    yield section, site.environ
    assert site.machines() == []


BACKENDS: dict[str, Callable[[pytest.FixtureRequest], AbstractContextManager[Section]]] = {
    "local": local,
    "ray": ray,
    "ssh": ssh,
    "slurm": slurm,
    "kubernetes": kubernetes,
    "cloud": cloud,
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Seen by all hosts under the same name."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        path = Path(folder) / STRANGE
        path.mkdir()
        yield path


def recipe(place: Path, name: str, cluster: dict[str, Any]) -> dict[str, Any]:
    return {**recipe_for(place, train={"max_steps": 5}), "name": name, "cluster": cluster}


def weights(directory: Path) -> str:
    """Of the last checkpoint, with the optimizer's state."""
    trained = read_run(directory)
    files = sorted(trained.checkpoint.rglob("*.safetensors"))
    assert {file.name for file in files} == {"model.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"}
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> str:
    """Weights of three ranks without any cluster."""
    return weights(train(recipe(place, "plain", {"type": "local"}), RANKS).directory)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_weights_everywhere(backend, place, undisturbed, request):
    with BACKENDS[backend](request) as (cluster, variables):
        write_recipe(place / f"{backend}.yaml", recipe(place, backend, cluster))
        code, said = run(ftlaunch(f"{backend}.yaml"), place, variables)
        assert code == 0, said
        assert weights(place / "runs" / backend) == undisturbed
        assert json.loads((place / f"runs/{backend}/attempts/a1.json").read_text())["world_size"] == RANKS

        code, said = run(ftlaunch(f"{backend}.yaml", "train.learning_rate=1e-3"), place, variables)
        assert code == 1, said
        assert f"run {backend} was begun with other values" in said
        assert "train.learning_rate" in said
        assert "--accept-changes" in said
    _nothing_is_left(place)


def _nothing_is_left(place: Path) -> None:
    assert not list(place.rglob("pwned"))
    assert [process for process in psutil.process_iter() if str(place) in " ".join(_words(process))] == []


@pytest.fixture(scope="module")
def shards(place: Path) -> dict[str, str]:
    """Made here, without any cluster."""
    path = write_recipe(place / "shards.yaml", recipe(place, "shards", {"type": "local"}))
    loaded = load_recipe(path, environ={}).recipe
    encode = open_encoder(spec_of(loaded, find_model(loaded.model.path), now=None))
    train, held_out = (
        build_index(one.sources, one.names) for one in (train_index(loaded.data), eval_index(loaded.data))
    )
    preparation = Preparation(loaded.data, train, held_out, encoder_digest(encode), str(place / "alone"))
    for piece in preparation.pieces():
        prepare_piece(preparation, piece, encode)
    return contents(place / "alone")


def contents(folder: Path) -> dict[str, str]:
    """Of the shards below a folder."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@pytest.mark.parametrize("backend", ["ssh", "kubernetes", "cloud"])  # slurm: with a requeue, in test_slurm.py
def test_the_same_shards_everywhere(backend, place, shards, request):
    with BACKENDS[backend](request) as (cluster, variables):
        write_recipe(place / f"to-{backend}.yaml", recipe(place, backend, cluster))
        code, said = run(ftlaunch("prepare", f"to-{backend}.yaml", "--to", f"{backend}-shards"), place, variables)
        assert code == 0, said
        assert contents(place / f"{backend}-shards") == shards
        assert "train/chat" in said
        made = load_recipe(place / f"to-{backend}.prepared.yaml", environ={}).recipe
        assert {source.format for source in made.data.train} == {"tokenized"}
        assert made.cluster == load_recipe(place / f"to-{backend}.yaml", environ={}).recipe.cluster
    _nothing_is_left(place)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
