"""The doctor on real hosts: a throttled link and other versions are named, and the run goes on without those hosts."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import BIN, ftlaunch, run
from ssh_hosts import Hosts
from tiny import recipe_for, write_recipe

from ftlaunch.launcher.doctor.command import findings_of
from ftlaunch.launcher.doctor.examine import Wanted
from ftlaunch.launcher.doctor.judge import unfit
from ftlaunch.recipes.schema_cluster import SshCluster

ENV = ["OMP_NUM_THREADS", "HF_HUB_*"]


@contextmanager
def throttled(hosts: Hosts, name: str) -> Iterator[None]:
    """What is sent to a host gets there at 8 Mbit/s."""
    device = ["tc", "qdisc", "add", "dev", hosts.members[name].link, "root"]
    subprocess.run([*device, "tbf", "rate", "8mbit", "burst", "32kb", "latency", "400ms"], check=True)
    try:
        yield
    finally:
        subprocess.run([*device[:2], "del", *device[3:]], check=True)


@contextmanager
def other_version(hosts: Hosts, name: str) -> Iterator[None]:
    """Another METADATA of numpy over the real one: one that ftlaunch would work with, but the others do not have."""
    import numpy

    metadata = Path(numpy.__file__).parents[1] / f"numpy-{importlib.metadata.version('numpy')}.dist-info" / "METADATA"
    other = hosts.folder / "NUMPY"
    other.write_text(metadata.read_text().replace(f"\nVersion: {numpy.__version__}\n", "\nVersion: 2.0.99\n", 1))
    hosts.shell(name, f"mount --bind {other} {metadata}")
    try:
        yield
    finally:
        hosts.shell(name, f"umount {metadata}")


@pytest.fixture
def work() -> Iterator[Path]:
    """Seen by all hosts under the same name."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        yield Path(folder)


def test_hosts_that_are_alike_are_fit_and_a_planted_one_is_named(hosts, work, capfd):
    wanted = Wanted(storage=str(work / "runs"), environ={}, folders=("", str(work / "runs")))
    cluster = SshCluster.model_validate(hosts.cluster())
    assert unfit(findings_of(cluster, wanted, print)) == {}
    with throttled(hosts, "beta"), other_version(hosts, "gamma"):
        recipe = {**recipe_for(work), "cluster": hosts.cluster(env=ENV)}
        code, said = run(ftlaunch("doctor", str(write_recipe(work / "bot.yaml", recipe))), work)
    assert code == 2, said
    assert "node beta is unfit: " in said
    assert "/s on its best link, where the others have" in said
    assert "node gamma is unfit: numpy 2.0.99 (others: " in said
    assert "node alpha is unfit" not in said
    assert "leave it out: 'cluster.hosts=[alpha]'" in said


def test_a_run_on_several_nodes_goes_on_without_the_bad_host(hosts, work):
    recipe = {
        **recipe_for(work, train={"max_steps": 3}),
        "name": "bot",
        "cluster": hosts.cluster(env=ENV, nodes=2, doctor=True),
    }
    write_recipe(work / "bot.yaml", recipe)
    with throttled(hosts, "beta"):
        code, said = run(ftlaunch("bot.yaml", "--nodes", "3"), work)
        assert code == 2, said
        assert "3 nodes are asked for, and 2 are fit" in said
        code, said = run(ftlaunch("bot.yaml"), work)
    assert code == 0, said
    assert "warning: node beta: network: " in said
    assert "(left out)" in said
    first = (work / "runs/bot/submissions").glob("001-*.json")
    [submission] = [json.loads(path.read_text()) for path in first if not path.name.endswith(".end.json")]
    assert submission["cluster"]["hosts"] == ["alpha", "gamma"]
    assert json.loads((work / "runs/bot/attempts/a1.json").read_text())["world_size"] == 2


NODES = """
import ray, sys
from ray.cluster_utils import Cluster
from ftlaunch.launcher.doctor.examine import Wanted, examine
from ftlaunch.launcher.doctor.judge import judge, unfit
from ftlaunch.launcher.doctor.ray_nodes import RayProber, held

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(num_cpus=1)
ray.init(cluster.address, log_to_driver=False)
with RayProber() as prober:
    assert len(prober.nodes) == 3, prober.nodes
    found = examine(prober, Wanted(storage=sys.argv[1], gpus=False), print)
    assert unfit(judge(found)) == {}, judge(found)
    assert all(len(measured.sent) == 2 for measured in found.values())
    with held(prober, prober.nodes[1:2]):
        where = ray.remote(num_cpus=1)(lambda: ray.get_runtime_context().get_node_id())
        used = {ray.get(where.remote()) for _ in range(6)}
        assert prober.ids[prober.nodes[1]] not in used, used
    again = {ray.get(where.remote()) for _ in range(3)}
ray.shutdown()
cluster.shutdown()
print("held")
"""


def test_on_ray_nodes_and_a_held_node_gets_no_work(tmp_path):
    code, said = run([str(BIN / "python"), "-P", "-c", NODES, str(tmp_path / "runs")], tmp_path)
    assert code == 0, said
    assert said.strip().endswith("held"), said
