"""Runs on Ray's real autoscaler with its provider of fake nodes: they ask, wait, train, and let go.

What `ray.cluster_utils.AutoscalingCluster` starts is started here by itself, because that one begins and ends with
`ray stop --force`, which would end what other tests have started (and Ray's wheel lacks a file that it reads).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import free_port
from processes import BIN, Command, ftlaunch, run
from tiny import recipe_for, write_recipe
from training import read_run, train

COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
)  # fmt: skip
"""That a configuration has to have; fake nodes run none of them."""

FAKE = ("disable_node_updaters", "disable_launch_config_check", "foreground_node_launch", "launch_multiple")
"""What its provider does without."""

ADDRESS = re.compile(r"--address='([^']+)'")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head without cores whose autoscaler may add two nodes of two cores: (address, its users' variables)."""
    folder = tmp_path_factory.mktemp("autoscaler")
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="r") as short:
        config = {
            "cluster_name": "fake",
            "max_workers": 2,
            "idle_timeout_minutes": 0.1,
            "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", **dict.fromkeys(FAKE, True)},
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
            },
            "upscaling_speed": 1.0,
            "auth": {"ssh_user": "nobody"},
            **{key: {} for key in ("file_mounts", "docker")},
            **{key: [] for key in COMMANDS},
        }
        (folder / "autoscaler.yaml").write_text(json.dumps(config))
        environ = {**variables, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        command = ["start", "--head", "--block", "--num-cpus=0", f"--port={port}", "--node-ip-address=127.0.0.1",
                   "--include-dashboard=false", f"--autoscaling-config={folder / 'autoscaler.yaml'}"]  # fmt: skip
        head = Command([str(BIN / "ray"), *command, f"--temp-dir={short}"], folder, environ)
        assert head.wait_until(lambda: ADDRESS.search(head.text) is not None), head.text
        yield f"127.0.0.1:{port}", variables
        head.kill()


def weights(directory: Path) -> str:
    files = sorted(read_run(directory).checkpoint.rglob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_nodes_come_are_trained_on_and_give_the_same_weights(cluster, tmp_path):
    address, variables = cluster
    recipe = recipe_for(tmp_path, train={"max_steps": 4})
    section = {"type": "ray", "address": address, "nodes": 2, "processes_per_node": 2, "gpus_per_node": 0}
    write_recipe(tmp_path / "bot.yaml", {**recipe, "name": "bot", "cluster": {**section, "doctor": False}})

    code, said = run(ftlaunch("bot.yaml", "--nodes", "3"), tmp_path, variables)
    assert code == 1, said
    flat = " ".join(said.split())
    assert "3 nodes with 0 GPUs and 2 cores are asked for, and the Ray cluster can have 2" in flat
    assert "It can add worker (0 GPUs and 2 cores, at most 2)" in flat

    code, said = run(ftlaunch("bot.yaml"), tmp_path, variables)
    assert code == 0, said
    assert "waiting for the cluster to add nodes: 0 of 2 with 0 GPUs and 2 cores are up" in said
    alone = train({**recipe, "name": "alone"}, 4)
    assert weights(tmp_path / "runs/bot") == weights(alone.directory)
