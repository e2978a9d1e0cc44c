"""A Ray cluster that is already running: joined with its token, given our code, and left as it was found."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import BIN, Command, environment, run
from processes import ftlaunch as command
from tiny import recipe_for, write_recipe


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head on this machine, as an administrator starts one: (address, the variables its users have)."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    pattern = re.compile(r"--address='([^']+)'")
    # Ray puts sockets below this folder, and the path of a socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="r") as short:
        head = Command(
            [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=3", "--port=0", "--include-dashboard=false",
             "--disable-usage-stats", f"--temp-dir={short}"],
            tmp_path_factory.mktemp("ray"),
            variables,
        )  # fmt: skip
        assert head.wait_until(lambda: pattern.search(head.text) is not None), head.text
        yield pattern.search(head.text)[1], variables
        head.kill()


def test_a_run_joins_trains_and_leaves(cluster, tmp_path):
    address, variables = cluster
    recipe = recipe_for(tmp_path, cluster={"type": "ray", "address": address, "processes_per_node": 2})
    code, output = run(command(str(write_recipe(tmp_path / "tiny.yaml", recipe))), tmp_path, variables)
    assert code == 0, output
    result = json.loads((tmp_path / "runs/tiny/result.json").read_text())
    assert result["steps"] == recipe["train"]["max_steps"]
    attempt = json.loads((tmp_path / "runs/tiny/attempts/a1.json").read_text())
    assert attempt["world_size"] == 2
    status = subprocess.run(
        [str(BIN / "ray"), "status", "--address", address],
        env=environment(variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert status.returncode == 0, status.stderr


def test_rows_are_prepared_on_a_cluster_that_is_there(cluster, tmp_path):
    address, variables = cluster
    recipe = recipe_for(tmp_path, cluster={"type": "ray", "address": address})
    write_recipe(tmp_path / "tiny.yaml", recipe)
    code, output = run(command("prepare", "tiny.yaml", "--to", "shards"), tmp_path, variables)
    assert code == 0, output
    counts = json.loads((tmp_path / "shards/prepared.json").read_text())["sources"]
    assert {name: count["rows"] for name, count in counts.items()} == {
        "train/chat": 60, "train/text": 40, "eval/chats": 10,
    }  # fmt: skip
    assert len(list((tmp_path / "shards").rglob("*.parquet"))) >= 3


def test_more_nodes_than_the_cluster_has(cluster, tmp_path):
    address, variables = cluster
    recipe = recipe_for(tmp_path, cluster={"type": "ray", "address": address, "nodes": 3})
    code, output = run(command(str(write_recipe(tmp_path / "tiny.yaml", recipe))), tmp_path, variables)
    assert code == 1, output
    assert "has 1" in output and "--nodes 1" in output


def test_without_the_token_nobody_gets_in(cluster, tmp_path):
    address, _ = cluster
    recipe = recipe_for(tmp_path, cluster={"type": "ray", "address": address})
    home = tmp_path / "home"
    home.mkdir()
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "HOME": str(home)}
    code, output = run(command(str(write_recipe(tmp_path / "tiny.yaml", recipe))), tmp_path, wrong)
    assert code == 2, output
    assert not (Path(tmp_path) / "runs/tiny/result.json").exists()


HOLD = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=2)
class Holder:
    def here(self):
        return True
holder = Holder.remote()
ray.get(holder.here.remote())
print("held", flush=True)
time.sleep(600)
"""


def test_a_cluster_without_room_is_waited_for_and_says_so(cluster, tmp_path):
    address, variables = cluster
    other = Command([sys.executable, "-c", HOLD, address], tmp_path, variables)
    assert other.wait_until(lambda: "held" in other.text), other.text
    recipe = recipe_for(tmp_path, cluster={"type": "ray", "address": address, "processes_per_node": 2})
    running = Command(command(str(write_recipe(tmp_path / "tiny.yaml", recipe))), tmp_path, variables)
    said = "waiting for room: 2 ranks need 2 CPU (free: 1); Ctrl-C gives up"
    assert running.wait_until(lambda: said in " ".join(running.text.split())), running.text
    running.interrupt()
    assert running.wait() == 130, running.text
    other.kill()
