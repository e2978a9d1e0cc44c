"""Runs on a real Slurm: what it refuses, what it waits for, requeues, who may see what, what is left."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import string
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from processes import Command, ftlaunch, run
from slurm_site import Site
from tiny import recipe_for, write_recipe
from training import read_run, train

from ftlaunch.cluster.slurm_keep import LOST
from ftlaunch.cluster.slurm_script import Script
from ftlaunch.recipes.schema_cluster import SlurmCluster

WAIT_S = 300.0
ENV = ["OMP_NUM_THREADS", "HF_HUB_*"]
RANKS = 2
STEPS = 150


@pytest.fixture
def work(slurm: Site, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all nodes share; nothing runs in it afterwards."""
    path = slurm.hosts.folder / request.node.name[:40]
    path.mkdir()
    yield path
    if jobs := slurm.jobs():
        slurm.run("scancel", "--signal=KILL", "--full", *jobs)
        slurm.run("scancel", *jobs)
        wait_until(lambda: not slurm.jobs(), "jobs do not end")


def prepare(work: Path, name: str, cluster: dict[str, Any], steps: int = 5, **changes: Any) -> Path:
    """A recipe; the directory of its run."""
    recipe = recipe_for(work, train={"max_steps": steps}, cluster=cluster, **changes)
    write_recipe(work / f"{name}.yaml", {**recipe, "name": name})
    return work / "runs" / name


def wait_until(happened, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def reached(directory: Path, step: int, attempt: int = 1) -> bool:
    """Whether an attempt has taken a step, or a later one."""
    log = directory / "metrics.jsonl"
    lines = (
        [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if log.exists()
        else []
    )
    return any(line["kind"] == "step" and line["attempt"] >= attempt and line["step"] >= step for line in lines)


def record(directory: Path) -> dict[str, Any]:
    """Of the newest submission."""
    files = [path for path in sorted((directory / "submissions").glob("*.json")) if not path.name.endswith(".end.json")]
    return json.loads(files[-1].read_text())


# --- before there are nodes -------------------------------------------------------------------------------------------


def test_sbatch_reads_values_as_they_are_meant(slurm, work):
    values = [string.punctuation, "it's $(touch pwned) `id`", 'a\\"b" # c', "\\'"]
    for value in values:
        cluster = SlurmCluster(type="slurm", options=(f"--comment={value}", "--hold"))
        script = work / "held.sh"
        script.write_text(Script(cluster, "a", str(work), sys.executable).text())
        job = slurm.run("sbatch", "--parsable", str(script))
        assert slurm.run("squeue", "--noheader", f"--jobs={job}", "--format=%k") == value
        slurm.run("scancel", job)
    folder = work / "100%j it's & $(touch pwned)"
    folder.mkdir()
    script.write_text("\n".join(["#!/bin/bash", *Script(SlurmCluster(), "a", str(folder), "p").directives(), "env"]))
    job = slurm.run("sbatch", "--parsable", str(script), environ={"SECRET": "s3cret"})
    wait_until(lambda: slurm.state(job) == "COMPLETED", "the job does not end")
    said = (folder / "driver.log").read_text()
    assert f"SLURM_JOB_ID={job}" in said
    assert "s3cret" not in said
    assert not list(work.rglob("pwned"))


def test_what_slurm_cannot_give_is_said_at_once(slurm, work):
    directory = prepare(work, "wrong", slurm.cluster(partition="tniy"))
    code, said = run(ftlaunch("wrong.yaml"), work, slurm.environ)
    assert code == 1, said
    assert "cluster.partition: Slurm knows no partition tniy; did you mean tiny? there are: batch, tiny" in said
    code, said = run(ftlaunch("--nodes", "4", "wrong.yaml", "cluster.partition=batch"), work, slurm.environ)
    assert code == 1, said
    assert "cluster.nodes: 4 nodes are asked for, partition batch has 3" in said
    refused = ("cluster.partition=batch", "cluster.constraint=quantum")
    code, said = run(ftlaunch("wrong.yaml", *refused), work, slurm.environ)
    assert code == 1, said
    assert "Slurm does not take the job: Batch job submission failed: Invalid feature specification" in said
    assert not directory.exists()
    assert not list(work.rglob(".ftlaunch-job-*"))
    code, said = run(ftlaunch("wrong.yaml"), work, {**slurm.environ, "PATH": str(work)})
    assert code == 1, said
    assert "sinfo is not on this machine: run ftlaunch on a login node" in said


def test_a_queue_that_never_starts(slurm, work):
    directory = prepare(work, "late", slurm.cluster(nodes=1, partition="tiny", time="60", queue_timeout_s=3))
    code, said = run(ftlaunch("late.yaml", "--detach"), work, slurm.environ)
    assert code == 0, said
    job = record(directory)["job"]
    assert f"submitted as job {job}: it goes on without this command" in said
    # Slurm's first word, within a second, is less precise than its second.
    assert re.search(
        r"it waits in the queue of partition tiny: Partition(Config|TimeLimit) \(.*it will not start", said
    ), said
    assert f"run: {directory}" in said

    code, said = run(ftlaunch("status", "late"), work, slurm.environ)
    assert f"submitted as job {job}, waits in the queue of partition tiny" in said
    code, said = run(ftlaunch("late.yaml"), work, slurm.environ)
    assert code == 1, said
    assert f"is submitted already: job {job} waits in the queue" in said

    code, said = run(ftlaunch("attach", "late"), work, slurm.environ)
    assert code == 2, said
    assert f"job {job} did not begin within 3 s (cluster.queue_timeout_s) and was cancelled" in said
    assert "PartitionTimeLimit" in said
    assert slurm.state(job) == "CANCELLED"
    code, said = run(ftlaunch("logs", "-f", "late"), work, slurm.environ)
    assert code == 0, said
    assert not list((work / "runs").glob(".ftlaunch-job-*/token"))


def test_nodes_that_do_not_fit_end_the_job_with_a_mistake(slurm, work):
    directory = prepare(work, "unfit", slurm.cluster(nodes=2), model={"tokenizer": str(work / "nowhere")})
    code, said = run(ftlaunch("unfit.yaml"), work, slurm.environ)
    assert code == 1, said
    for name in ("n1", "n2"):
        assert f"node {name}: model.tokenizer: {work}/nowhere is not there" in said
    assert slurm.state(record(directory)["job"]) == "FAILED"
    code, said = run(ftlaunch("attach", "unfit"), work, slurm.environ)
    assert code == 1, said


@contextmanager
def mounted(slurm: Site, name: str, source: Path, target: Path) -> Iterator[None]:
    """One node sees something else under a name."""
    slurm.hosts.shell(name, f"mount --bind {source} {target}")
    try:
        yield
    finally:
        slurm.hosts.shell(name, f"umount {target}")


@contextmanager
def other_version(slurm: Site, name: str, work: Path, package: str, version: str) -> Iterator[None]:
    """One node has this version of a package, as far as its metadata say."""
    real = importlib.metadata.version(package)
    [metadata] = Path(ray.__file__).parents[1].glob(f"{package}-{real}.dist-info/METADATA")
    (work / "METADATA").write_text(metadata.read_text().replace(f"\nVersion: {real}\n", f"\nVersion: {version}\n", 1))
    with mounted(slurm, name, work / "METADATA", metadata):
        yield


def test_a_node_with_other_versions_or_another_folder(slurm, work):
    prepare(work, "other", slurm.cluster(nodes=2))
    with other_version(slurm, "n2", work, "ray", "2.59.1"):
        code, said = run(ftlaunch("other.yaml"), work, slurm.environ)
    assert code == 1, said
    assert "node n2: ftlaunch needs ray" in said
    assert f"nodes differ: ray is {ray.__version__} on n1, 2.59.1 on n2; install the same on all" in said
    (work / "empty").mkdir()
    with mounted(slurm, "n2", work / "empty", work / "runs"):
        code, said = run(ftlaunch("other.yaml"), work, slurm.environ)
    assert code == 1, said
    assert "error: node n2: " in said
    assert "is not there. All nodes must see the folder above it" in said
    assert slurm.left() == {}


# --- runs -------------------------------------------------------------------------------------------------------------


def weights(directory: Path) -> str:
    files = sorted(read_run(directory).checkpoint.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_a_time_limit_a_preemption_and_a_lost_node_change_nothing(slurm, work):
    """The machine that submitted is gone at once; somebody else follows, through three requeues."""
    saves = {"every_steps": 10}
    directory = prepare(work, "long", slurm.cluster(nodes=RANKS, env=ENV), STEPS, checkpoint=saves)
    plain = recipe_for(work, train={"max_steps": STEPS}, checkpoint=saves)
    undisturbed = weights(train({**plain, "name": "plain"}, RANKS).directory)
    laptop = Command(ftlaunch("long.yaml"), work, slurm.environ)
    assert laptop.wait_until(lambda: "submitted as job" in laptop.text), laptop.text
    os.kill(laptop.process.pid, signal.SIGKILL)
    laptop.process.wait()
    job = record(directory)["job"]
    attached = Command(ftlaunch("attach", "long"), work, slurm.environ)

    wait_until(lambda: reached(directory, 5, 1), f"attempt 1: {attached.text}")
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before a time limit
    wait_until(lambda: reached(directory, 10, 2), f"attempt 2: {attached.text}")
    urgent = ("--partition=urgent", "--exclusive", "--nodes=2", "--nodelist=n1,n2", "--output=/dev/null")
    slurm.run("sbatch", *urgent, "--wrap=sleep 1")
    wait_until(lambda: reached(directory, 15, 3), f"attempt 3: {attached.text}")
    assert slurm.hosts.members["n2"].end("bin/keep") == 1

    assert attached.wait() == 0, attached.text
    assert attached.text.count("the job goes back into the queue") >= 3
    assert "waits in the queue of partition batch: BeginTime" in attached.text
    assert "continuing run long from step" in attached.text
    outcomes = [json.loads((directory / f"attempts/a{n}.end.json").read_text())["outcome"] for n in (1, 2)]
    assert outcomes == ["interrupted", "interrupted"]
    failures = [json.loads(path.read_text()) for path in sorted((directory / "failures").iterdir())]
    # Once, whoever has seen it first: the job, or the run's driver by its ranks or by its nodes.
    [says] = [failure["says"] for failure in failures if failure["counts"]]
    assert says in (LOST, "the process was killed", "the node does not answer any more")
    assert {failure["launch"] for failure in failures} == {job}
    assert weights(directory) == undisturbed
    assert slurm.state(job) == "COMPLETED"
    assert slurm.left() == {}
    [ended] = (directory / "submissions").glob("*.end.json")
    assert json.loads(ended.read_text())["exit_code"] == 0


WRONG_CLOCK = """
import socket, time

if socket.gethostname() == "n2":
    time.time = lambda real=time.time: real() + 60.0
"""


def test_an_unfit_node_is_replaced_by_another(slurm, work):
    """Its clock is wrong: the job that has it goes back into the queue, and runs without it."""
    (work / "site").mkdir()
    (work / "site/sitecustomize.py").write_text(WRONG_CLOCK)
    cluster = slurm.cluster(
        nodes=RANKS, env=ENV, doctor=True, setup=[f"export PYTHONPATH={shlex.quote(str(work))}/site:$PYTHONPATH"]
    )
    directory = prepare(work, "unfit", cluster, 3)
    code, said = run(ftlaunch("unfit.yaml"), work, slurm.environ)
    assert code == 0, said
    assert re.search(r"node n2 is unfit: \+\d\d\.\d s off the others'", said), said
    assert "it is started again, from the beginning" in said
    assert "it is not to have n2 again" in said
    job = record(directory)["job"]
    assert "ExcNodeList=n2 " in slurm.run("scontrol", "--oneliner", "show", "job", job)
    assert re.search(rf"job {job} runs on n\[1,3\]", said), said
    [failure] = [json.loads(path.read_text()) for path in (directory / "failures").iterdir()]
    assert (failure["kind"], failure["counts"]) == ("unfit", True)
    assert [line["attempt"] for line in read_run(directory).steps] == [1, 1, 1]
    assert slurm.left() == {}


def test_a_detached_run_is_stopped_saves_and_goes_on(slurm, work):
    secret = {"FT_SECRET": "s3cret-value"}
    directory = prepare(work, "quiet", slurm.cluster(nodes=RANKS, env=[*ENV, "FT_*"]), 400)
    code, said = run(ftlaunch("quiet.yaml", "--detach"), work, {**slurm.environ, **secret})
    assert code == 0, said
    wait_until(lambda: reached(directory, 2), said)

    found = record(directory)
    folder, job = Path(found["folder"]), found["job"]
    token = (folder / "token").read_text()
    assert len(token) == 64
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {(folder / name).stat().st_mode & 0o777 for name in ("token", "env.json", "driver.json")} == {0o600}
    told = slurm.run("scontrol", "show", "job", job) + slurm.run("scontrol", "write", "batch_script", job, "-")
    logs = "".join(path.read_text(errors="replace") for path in slurm.folder.glob("*.log"))
    for host in slurm.hosts.members.values():
        told += "\n".join(host.processes(""))
    for hidden in (token, *secret.values()):
        assert hidden not in told + logs + json.dumps(found)
        assert hidden not in (folder / "driver.log").read_text()
    [rank0] = [json.loads((directory / "attempts/a1.json").read_text())["process"]["host"]]
    assert rank0 == "n1"  # with the driver

    code, said = run(ftlaunch("stop", "quiet"), work, slurm.environ)
    assert code == 0, said
    assert slurm.jobs() == []
    assert slurm.left() == {}
    assert json.loads((directory / "attempts/a1.end.json").read_text())["outcome"] == "interrupted"
    assert not (folder / "token").exists()
    code, said = run(ftlaunch("attach", "quiet"), work, slurm.environ)
    assert code == 130, said
    assert "stopped after step" in said

    step = read_run(directory).steps[-1]["step"]
    inside = ("salloc", "--quiet", "--nodes=1")
    code, said = run([*inside, *ftlaunch("--nodes", "2", "quiet.yaml")], work, slurm.environ)
    assert code == 1, said
    assert "cluster.nodes: 2 nodes are asked for, allocation" in said
    words = ("--nodes", "1", "quiet.yaml", f"train.max_steps={step + 2}", "--accept-changes")
    code, said = run([*inside, *ftlaunch(*words)], work, slurm.environ)
    assert code == 0, said
    assert f"continuing run quiet from step {step}" in said
    assert "inside allocation" in said
    assert [line["step"] for line in read_run(directory).steps] == list(range(1, step + 3))
    assert slurm.left() == {}


def test_two_jobs_on_the_same_nodes_end_each_by_itself(slurm, work):
    """One at once, by `stop --now`; one by Slurm's own command: it saves within KillWait, and is not started again."""
    directory = prepare(work, "gone", slurm.cluster(nodes=RANKS, env=ENV), 4000)
    beside = prepare(work, "beside", slurm.cluster(nodes=RANKS, env=ENV), 4000)
    code, said = run(ftlaunch("beside.yaml", "--detach"), work, slurm.environ)
    assert code == 0, said
    following = Command(ftlaunch("gone.yaml"), work, slurm.environ)
    wait_until(lambda: reached(directory, 3) and reached(beside, 3), following.text)
    code, said = run(ftlaunch("stop", "--now", "beside"), work, slurm.environ)
    assert code == 0, said
    assert slurm.state(record(beside)["job"]) == "CANCELLED"
    assert not (beside / "attempts/a1.end.json").exists()
    job = record(directory)["job"]
    assert slurm.jobs() == [job]
    step = read_run(directory).steps[-1]["step"]
    wait_until(lambda: reached(directory, step + 3), following.text)  # undisturbed
    slurm.run("scancel", job)
    assert following.wait() == 130, following.text
    assert f"job {job} was cancelled" in following.text
    assert slurm.state(job) == "CANCELLED"
    assert slurm.left() == {}
    assert json.loads((directory / "attempts/a1.end.json").read_text())["outcome"] == "interrupted"
    assert list((directory / "commits").iterdir())
    assert not Path(record(directory)["folder"], "token").exists()


# --- rows prepared ----------------------------------------------------------------------------------------------------


def test_a_preparation_that_has_to_leave_its_nodes_goes_on(slurm, work):
    prepare(work, "rows", slurm.cluster(nodes=2, env=ENV))
    preparing = Command(ftlaunch("prepare", "rows.yaml", "--to", "shards"), work, slurm.environ)
    wait_until(lambda: slurm.hosts.members["n1"].processes("bin/drive"), "the job does not begin")
    [job] = slurm.jobs()
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as before its time is over
    assert preparing.wait() == 0, preparing.text
    assert "the job goes back into the queue" in preparing.text
    recipe = json.loads((work / "rows.yaml").read_text())
    write_recipe(work / "here.yaml", {**recipe, "cluster": {"type": "local"}})
    code, said = run(ftlaunch("prepare", "here.yaml", "--to", "shards"), work)
    assert code == 0, said  # shards of anything else would be refused
    counts = json.loads((work / "shards/prepared.json").read_text())["sources"]
    assert {name: count["rows"] for name, count in counts.items()} == {
        "train/chat": 60, "train/text": 40, "eval/chats": 10,
    }  # fmt: skip
    assert slurm.left() == {}


def test_ctrl_c_ends_a_preparation(slurm, work):
    prepare(work, "rows", slurm.cluster(env=ENV, options=["--hold"]))
    preparing = Command(ftlaunch("prepare", "rows.yaml", "--to", "shards"), work, slurm.environ)
    assert preparing.wait_until(lambda: "waits in the queue" in preparing.text), preparing.text
    preparing.interrupt()
    assert preparing.wait() == 130, preparing.text
    assert "the same command goes on from there" in preparing.text
    assert slurm.jobs() == []
