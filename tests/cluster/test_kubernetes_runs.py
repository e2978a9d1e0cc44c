"""Runs whose RayJob is played on namespace hosts: they go on without us, are followed, stopped, and leave nothing."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kube_api import Served
from kube_operator import Operator, kubernetes_on
from processes import Command, ftlaunch, run
from ssh_hosts import Hosts
from tiny import recipe_for, write_recipe
from training import read_run, train

from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher.budget import read_failures
from ftlaunch.launcher.restarted import LOST

WAIT_S = 120.0
SECRET = "hf_" + "q7" * 12


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Seen by all hosts under the same name."""
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, place: Path, tmp_path_factory) -> Iterator[tuple[Served, Operator]]:
    with kubernetes_on(hosts, tmp_path_factory.mktemp("kube"), place) as made:
        yield made


def prepare(place: Path, name: str, served: Served, steps: int, *, large: bool = False, **changes: object) -> Path:
    """A recipe, of `large` steps if they are to last; the directory of its run."""
    section = served.cluster(
        python=sys.executable, volumes=[{"claim": "shared", "path": str(place)}],
        env=["OMP_NUM_THREADS", "HF_HUB_*", "HF_TOKEN"], **changes,
    )  # fmt: skip
    sizes, data = ({"global_batch_size": 48}, {"sequence_length": 256}) if large else ({}, {})
    saves = {"every_steps": 30} if large else {}
    recipe = recipe_for(place, train={"max_steps": steps, **sizes}, data=data, checkpoint=saves, cluster=section)
    write_recipe(place / f"{name}.yaml", {**recipe, "name": name})
    return place / "runs" / name


def wait_until(happened, what) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def reached(directory: Path, step: int) -> bool:
    log = directory / "metrics.jsonl"
    return log.exists() and f'"step":{step},' in log.read_text()


def left(served: Served) -> list[tuple[str, str]]:
    kinds = ("rayjobs", "rayclusters", "pods", "secrets", "poddisruptionbudgets")
    return [key for key in served.kube.objects if key[0] in kinds]


def test_a_detached_run_goes_on_is_stopped_saves_and_goes_on(cluster, place):
    served, played = cluster
    directory = prepare(place, "long", served, 400, nodes=2)
    code, said = run(ftlaunch("long.yaml", "--detach"), place, {"HF_TOKEN": SECRET})
    assert code == 0, said
    assert "it goes on without this command" in said
    wait_until(lambda: reached(directory, 2), lambda: "".join(log.read_text() for log in served.kube.logs.values()))

    [submission] = (directory / "submissions").glob("*.json")
    record = json.loads(submission.read_text())
    [secret] = served.kube.all("secrets")
    token = base64.b64decode(secret["data"]["auth_token"]).decode()
    assert len(token) == 64
    public = [json.dumps(each) for (kind, _), each in served.kube.objects.items() if kind != "secrets"]
    shown = [log.read_text() for log in played.folder.glob("*.log")]
    commands = [" ".join(each.cmdline()) for each in _descendants(played)]
    for text in [*public, *shown, *commands, submission.read_text(), said]:
        assert token not in text
        assert SECRET not in text
    assert [each.environment["HF_TOKEN"] for each in played.containers.values()] == [SECRET] * 2
    assert not any("driver.json" in each["key"] for each in _worker_items(served))
    rank0 = json.loads((directory / "attempts/a1.json").read_text())["process"]
    assert rank0["host"] == "alpha"  # the head, with the driver

    code, said = run(ftlaunch("status", "long"), place)
    assert f"submitted as job {record['job']}, driven on train/ft-long-{record['job']}" in said
    attached = Command(ftlaunch("attach", "long"), place)
    assert attached.wait_until(lambda: "step " in attached.text), attached.text
    attached.interrupt()
    assert attached.wait() == 0
    assert "let go: the run goes on" in attached.text

    code, said = run(ftlaunch("stop", "long"), place)
    assert code == 0, said
    assert left(served) == []
    assert played.ended == [0, 0]
    assert json.loads((directory / "attempts/a1.end.json").read_text())["outcome"] == "interrupted"
    code, said = run(ftlaunch("logs", "-f", "long"), place)
    assert code == 0
    assert "stopped after step" in said
    step = read_run(directory).steps[-1]["step"]

    command = ftlaunch("--nodes", "1", "long.yaml", f"train.max_steps={step + 2}", "--accept-changes")
    code, said = run(command, place, {"HF_TOKEN": SECRET})
    assert code == 0, said
    assert f"continuing run long from step {step}" in said
    assert "ftlaunch: job" not in said  # the line that carries the exit code
    assert [line["step"] for line in read_run(directory).steps] == list(range(1, step + 3))
    assert left(served) == []


def _descendants(played: Operator) -> list:
    import psutil

    return [
        process
        for container in played.containers.values()
        for process in [psutil.Process(container.process.pid), *psutil.Process(container.process.pid).children(True)]
    ]


def _worker_items(served: Served) -> list[dict[str, str]]:
    [job] = served.kube.all("rayjobs")
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group["template"]["spec"]["volumes"][0]["secret"]["items"]


def test_the_launcher_is_killed_a_node_is_unfit_a_worker_evicted_and_stop_now(cluster, place):
    """Somebody else follows. A node with a full disk is replaced before the run begins; the ranks of a worker that has
    to go save, and go on when there is another one: no step is taken twice."""
    served, played = cluster
    directory = prepare(place, "alone", served, 400, large=True, nodes=2, doctor=True)
    played.full.add("beta")
    command = Command(ftlaunch("alone.yaml"), place, {"HF_TOKEN": SECRET})
    assert command.wait_until(lambda: "waiting: " in command.text), command.text
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait()
    wait_until(lambda: list((directory / "submissions").glob("*.json")), lambda: "the driver does not begin")
    attached = Command(ftlaunch("attach", "alone"), place)
    assert attached.wait_until(lambda: reached(directory, 5)), attached.text
    assert "the job is started again, and keeps off beta" in attached.text
    [worker] = [name for kind, name in served.kube.objects if kind == "pods" and "worker" in name]
    assert played.containers[worker].host.name == "gamma"
    served.kube.delete("pods", worker)
    again = re.compile('"kind":"step","step":[0-9]+,"attempt":2,')
    assert attached.wait_until(lambda: again.search((directory / "metrics.jsonl").read_text())), attached.text
    failures = read_failures(RunDirectory(str(directory)))
    assert [(failure.kind, failure.counts) for failure in failures] == [("unfit", True), ("preempted", False)]
    assert "is about to be taken away: the ranks have saved and left" in attached.text
    code, said = run(ftlaunch("stop", "--now", "alone"), place)
    assert code == 0, said
    assert left(served) == []
    attached.wait()
    steps = [line["step"] for line in read_run(directory).steps]
    assert steps == list(range(1, len(steps) + 1))
    played.full.clear()


@pytest.mark.evidence
def test_lost_pods_are_replaced(cluster, place):
    """A worker, then the head: KubeRay makes another worker, and starts the whole job again. Every step is there once,
    and the weights are those of a run that nothing happened to."""
    served, played = cluster
    directory = prepare(place, "lossy", served, 90, nodes=2, backoff_limit=3)
    recipe = json.loads((place / "lossy.yaml").read_text())
    undisturbed = train({**recipe, "name": "whole", "cluster": {"type": "local"}}, 2)
    command = Command(ftlaunch("lossy.yaml"), place, {"HF_TOKEN": SECRET})
    for part, step in (("worker", 5), ("head", 40)):
        assert command.wait_until(lambda step=step: reached(directory, step)), command.text
        [lost] = [each for name, each in played.containers.items() if part in name]
        lost.process.kill()  # and with it all that runs in the pod
    assert command.wait() == 0, command.text
    trained = read_run(directory)
    assert sorted({line["step"] for line in trained.steps}) == list(range(1, 91))
    assert trained.tensors.keys() == undisturbed.tensors.keys()
    assert all(trained.tensors[name].equal(tensor) for name, tensor in undisturbed.tensors.items())
    assert len(list((directory / "attempts").glob("a?.json"))) >= 3
    assert "has ended with exit code 137. KubeRay makes another one in its place" in command.text
    failures = read_failures(RunDirectory(str(directory)))
    assert LOST in [failure.says for failure in failures]
    assert len({failure.launch for failure in failures}) == 1
    assert left(served) == []


def test_a_killed_driver_and_an_evicted_head(cluster, place):
    """The driver is started again where it was; a head that has to go saves, and the job goes on with nothing computed
    twice by that."""
    served, played = cluster
    directory = prepare(place, "evicted", served, 300, nodes=1, backoff_limit=1)
    command = Command(ftlaunch("evicted.yaml"), place, {"HF_TOKEN": SECRET})
    assert command.wait_until(lambda: reached(directory, 5)), command.text
    [driver] = [each for each in _descendants(played) if "bin/drive" in " ".join(each.cmdline())]
    driver.kill()
    assert command.wait_until(lambda: reached(directory, 40)), command.text
    [head] = [name for kind, name in served.kube.objects if kind == "pods"]
    served.kube.delete("pods", head)
    assert command.wait() == 0, command.text
    steps = [line["step"] for line in read_run(directory).steps]
    assert sorted(set(steps)) == list(range(1, 301))
    assert steps[steps.index(40) :] == list(range(40, 301))
    assert len(list((directory / "attempts").glob("a?.json"))) == 3
    assert "the job is started again" in command.text
    [failure] = read_failures(RunDirectory(str(directory)))  # who leaves has not failed
    assert "the driver was killed" in failure.says
    assert left(served) == []


def test_an_image_without_what_is_needed_says_so(cluster, place, monkeypatch):
    served, _played = cluster
    from importlib.metadata import requires

    directory = prepare(place, "unfit", served, 2)
    fake = place / "python-without-torch"
    fake.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import importlib.metadata as m, runpy, sys; real = m.version; '
        "m.version = lambda name: '1.0' if name == 'torch' else real(name); sys.argv = sys.argv[2:]; "
        'runpy.run_path(sys.argv[0], run_name=\'__main__\')" "$@"\n'
    )
    fake.chmod(0o755)
    assert any(each.startswith("torch") for each in requires("ftlaunch"))
    code, said = run(ftlaunch("unfit.yaml", f"cluster.python={fake}"), place, {"HF_TOKEN": SECRET})
    assert code == 1, said
    assert "the image lacks what ftlaunch needs: torch" in said
    assert "(1.0)" in said
    assert not directory.exists()
    assert left(served) == []
