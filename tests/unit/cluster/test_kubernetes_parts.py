"""The parts of the `kubernetes` cluster that need no server: manifests, causes, the end of logs, the pods' agent."""

from __future__ import annotations

import io
import itertools
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from kube_api import complaints, crd_folder

from ftlaunch.cluster import pod_agent
from ftlaunch.cluster.base import Need
from ftlaunch.cluster.kubernetes import Kubernetes
from ftlaunch.cluster.kubernetes_causes import causes
from ftlaunch.cluster.kubernetes_checks import number
from ftlaunch.cluster.kubernetes_follow import Filter
from ftlaunch.cluster.kubernetes_job import SECRET_BYTES, Job, as_yaml, packed, secret_content
from ftlaunch.launcher.package import write_package
from ftlaunch.launcher.submit import need_of
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe
from ftlaunch.recipes.schema_kubernetes import KubernetesCluster

EVERYTHING = {
    "image": "registry.example/ftlaunch@sha256:" + "0" * 64,
    "nodes": 4,
    "gpus_per_node": 8,
    "cpus_per_node": 90,
    "memory": "1500Gi",
    "resources": {"vpc.amazonaws.com/efa": 32},
    "image_pull_policy": "Always",
    "image_pull_secrets": ["one", "two"],
    "service_account": "trainer",
    "env": ["HF_TOKEN", "AWS_*"],
    "env_from_secrets": ["store"],
    "volumes": [{"claim": "a", "path": "/data", "read_only": True}, {"claim": "b", "path": "/runs"}],
    "node_selector": {"zone": "on"},
    "tolerations": [{"key": "gpu"}, {"key": "team", "value": "a", "effect": "NoExecute"}],
    "priority_class": "high",
    "labels": {"team": "yes"},
    "annotations": {"acme.com/note": "a: b"},
    "queue": "gpus",
    "backoff_limit": 3,
    "start_deadline_seconds": 60,
    "active_deadline_seconds": 3600,
    "run_as_user": 1001,
    "fs_group": 100,
}


def config(**changes: Any) -> KubernetesCluster:
    return KubernetesCluster.model_validate({"type": "kubernetes", "image": "a", "gpus_per_node": 0, **changes})


def job(run: str = "run", **changes: Any) -> Job:
    return Job("0a1b2c3d", run, "train", config(**changes), ["HF_TOKEN"])


# --- manifests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"gpus_per_node": 2}, EVERYTHING, {"gang_scheduler": "kai-scheduler", "gang_queue": "q"}, {"fs_group": None}],
)
def test_manifests_are_accepted(changes):
    crd_folder()
    made = job(**changes)
    for manifest in [*made.manifests(), made.secret({"a": b"\x00"}), made.secret_unseen()]:
        assert complaints(manifest) == []


def test_every_key_arrives():
    """What is asked for is somewhere in what is made."""
    text = json.dumps(job(**EVERYTHING).manifests())
    for value in ("Always", "trainer", "store", "vpc.amazonaws.com/efa", "NoExecute", "high", "a: b", "gpus", "1500Gi"):
        assert value in text
    spec = job(**EVERYTHING).rayjob()["spec"]
    assert (spec["suspend"], spec["backoffLimit"], spec["preRunningDeadlineSeconds"]) == (True, 3, 60)
    assert spec["activeDeadlineSeconds"] == 3600
    pods = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    assert [group.get("replicas", 1) for group in pods] == [1, 3]
    for group in pods:
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] == {"zone": "on"}
        assert pod["tolerations"][0] == {"operator": "Exists", "key": "gpu"}
        assert pod["tolerations"][1] == {"operator": "Equal", "key": "team", "value": "a", "effect": "NoExecute"}
        assert pod["securityContext"]["runAsUser"] == 1001
        assert group["rayStartParams"]["num-gpus"] == "8"
        assert group["rayStartParams"]["num-cpus"] == "88"  # 11 for each of 8 ranks
        [container] = pod["containers"]
        stop_s = next(each["value"] for each in container["env"] if each["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
        assert 0 < int(stop_s) < pod["terminationGracePeriodSeconds"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
    assert "secretName" in spec["rayClusterSpec"]["authOptions"]
    assert set(EVERYTHING) <= set(KubernetesCluster.model_fields)


@pytest.mark.parametrize(
    ("changes", "nodes", "ranks", "cpus"),
    [
        ({}, 1, 1, 1),
        ({"nodes": 3, "processes_per_node": 2}, 3, 6, 1),
        ({"nodes": 2, "gpus_per_node": 8}, 2, 16, 8),
        ({"gpus_per_node": 3, "cpus_per_node": 10}, 1, 3, 3),
        ({"processes_per_node": 4, "cpus_per_node": 2}, 1, 4, 1),
    ],
)
def test_what_a_run_gets(changes, nodes, ranks, cpus):
    demand = job(**changes).demand
    assert (demand.nodes, demand.ranks, demand.cpus_per_rank) == (nodes, ranks, cpus)
    assert demand.uses_gpus == bool(changes.get("gpus_per_node"))


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("support-bot", "ft-support-bot-0a1b2c3d"),
        ("Überraschung! $(id) ; x" + "y" * 99, "ft-berraschung-id-x" + "y" * 14 + "-0a1b2c3d"),
        ("ÄÖ", "ft-0a1b2c3d"),
    ],
)
def test_names_are_taken_by_kubernetes(run, name):
    assert job(run).name == name
    assert len(name) <= 47


def test_yaml_is_read_as_it_is_meant():
    """Kubernetes reads YAML 1.1, where yes is true and 0b1 a number."""
    from ruamel.yaml import YAML

    texts = [
        "yes",
        "Off",
        "n",
        "true",
        "1e3",
        "0x1F",
        "010",
        "12:30:00",
        "1_000",
        "~",
        "null",
        "",
        ".5",
        "-1",
        "a: b",
        "# c",
        "x",
    ]
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    [read] = yaml.load_all(as_yaml([{"texts": texts, "numbers": [1, 0.5, True]}]))
    assert read == {"texts": texts, "numbers": [1, 0.5, True]}


def test_code_recipe_and_agent_fit_into_a_secret(tmp_path):
    code = write_package(tmp_path)
    content = secret_content(job(), "a:b", "/", ["torch>=2"], {"loaded": {}}, code, "t" * 64, {"HF_TOKEN": "x"})
    assert sum(map(len, content.values())) < SECRET_BYTES * 0.7  # half is ours to grow into, and the user's
    assert packed(code) == content["package.tar.xz"]
    with tarfile.open(fileobj=io.BytesIO(content["package.tar.xz"])) as archive:
        assert "ftlaunch/cluster/pod_agent.py" in archive.getnames()


def test_paths_that_a_run_reads():
    recipe = Recipe.model_validate({
        "name": "a", "model": {"path": "org/name"}, "checkpoint": {"path": "s3://a/runs"},
        "data": {"train": [{"path": "/data/*.jsonl"}, {"path": "/data/a.jsonl"}, {"path": "hub:org/rows"}]},
    })  # fmt: skip
    need = need_of(recipe, {})
    assert need.patterns == {"data.train.0.path": "/data/*.jsonl"}
    assert need.paths == {"data.train.1.path": "/data/a.jsonl"}
    assert (need.shared, need.name) == (None, "a")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError, match=r"needs the Kubernetes client: pip install 'ftlaunch\[k8s\]'"):
        Kubernetes(config(), Need(folder="/")).problems()


@pytest.mark.parametrize(("text", "value"), [("500m", 0.5), ("4", 4), (8, 8), ("1.5k", 1500), ("2Gi", 2**31)])
def test_quantities(text, value):
    assert number(text) == value


# --- causes and logs --------------------------------------------------------------------------------------------------


def test_causes_of_a_pod_by_what_the_scheduler_says():
    table = {
        "0/9 nodes are available: 9 node(s) had untolerated taint {nvidia.com/gpu: }.": "cluster.tolerations",
        "0/9 nodes are available: 9 node(s) didn't match Pod's node affinity/selector.": "cluster.node_selector",
        "0/9 nodes are available: 4 Insufficient cpu, 5 Insufficient memory.": "cluster.memory",
        'persistentvolumeclaim "a" not found': "kubectl describe pvc",
        "too many pods": "kubectl describe pod",
    }
    for message, remedy in table.items():
        condition = {"type": "PodScheduled", "status": "False", "message": message}
        pod = {"metadata": {"name": "a"}, "spec": {}, "status": {"conditions": [condition]}}
        [found] = causes({"metadata": {}}, [pod, pod], [], [])
        assert message.rstrip(".") in found.text
        assert remedy in found.remedy
        assert not found.hopeless


@pytest.mark.parametrize("seed", range(20))
def test_the_exit_code_is_taken_out_of_the_log_however_it_comes(seed):
    rng = random.Random(seed)
    words = ["step\n", "\n", "ftlaunch: job", "\nftlaunch: job b has ended", "x\r"]
    shown = "".join(rng.choice(words) for _ in range(30)) + "\n"
    code = rng.choice([0, 1, 2, 130, -9])
    asks = rng.choice(["", f"{pod_agent.unfit_mark('a1')}10.0.0.2,10.0.0.3\n"])
    whole = f"{shown}{asks}{shown}{pod_agent.exit_mark('a1')}{code}\nmore".encode()
    cuts = sorted(rng.sample(range(1, len(whole)), rng.randint(0, 12)))
    parts = [whole[a:b] for a, b in itertools.pairwise([0, *cuts, len(whole)])]
    read = Filter("a1")
    said = b"".join(read.feed(part) for part in parts if read.code is None)  # then nobody reads on
    assert said.decode() == 2 * shown
    assert read.code == code
    assert read.unfit == (("10.0.0.2", "10.0.0.3") if asks else ())


def test_a_log_without_an_end_holds_nothing_back():
    read = Filter("a1")
    assert read.feed(b"a\nstep 1") == b"a\nstep 1"
    assert read.feed(b"\n") == b"\n"
    assert read.code is None


# --- the agent --------------------------------------------------------------------------------------------------------


def agent(tmp_path: Path, code: str) -> subprocess.Popen[str]:
    """The agent's module with other folders, in a process of its own."""
    (tmp_path / "job").mkdir()
    (tmp_path / "work").mkdir()
    text = (
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(pod_agent.__file__).parent)!r})\n"
        f"import pod_agent as module\nhere = Path({str(tmp_path)!r})\n"
        "module.JOB, module.WORK = here / 'job', here / 'work'\n"
    )
    return subprocess.Popen([sys.executable, "-c", text + code], stdout=subprocess.PIPE, text=True)


def test_an_image_that_lacks_something(tmp_path, monkeypatch):
    monkeypatch.setattr(pod_agent, "JOB", tmp_path)
    (tmp_path / "agent.json").write_text(json.dumps({"needs": ["packaging>=1", "pytest<1", "not-there-at-all>=2"]}))
    said = pod_agent.unfit()
    assert f"pytest<1 ({pytest.__version__})" in said
    assert "not-there-at-all>=2 (not there)" in said
    assert "packaging" not in said
    (tmp_path / "agent.json").write_text(json.dumps({"needs": ["pytest>=1"]}))
    assert pod_agent.unfit() is None


def test_the_entrypoint_asks_waits_and_passes_on(tmp_path):
    """It starts nothing itself; a signal is a request to save, however often it comes."""
    waiting = agent(tmp_path, "sys.exit(module.driver())")
    deadline = time.monotonic() + 30
    while not (tmp_path / "work/start").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "work/driver.log").write_text("step 1\n")
    waiting.send_signal(signal.SIGTERM)
    while not (tmp_path / "work/stop").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    waiting.send_signal(signal.SIGTERM)
    (tmp_path / "work/driver.log").write_text("step 1\nsaved\n")
    (tmp_path / "work/exit").write_text("130")
    assert waiting.communicate(timeout=30)[0] == "step 1\nsaved\n"
    assert waiting.returncode == 130


def test_a_first_process_reaps_and_passes_signals_on(tmp_path):
    code = (
        "import ctypes, os, signal, time\n"
        "ctypes.CDLL(None).prctl(36, 1)\n"  # PR_SET_CHILD_SUBREAPER: orphans come to it, as to a container's first
        "def work():\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "    if (parent := os.fork()) == 0:\n"
        "        if (orphan := os.fork()) == 0:\n"
        "            os._exit(0)\n"
        "        print(orphan, flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(parent, 0)\n"
        "    while True:\n"
        "        time.sleep(60)\n"
        "code = module.as_init(work)\n"
        "sys.exit(code)\n"
    )
    running = agent(tmp_path, code)
    orphan = int(running.stdout.readline())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(orphan):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 7
