"""Whole runs that lose ranks, nodes and drivers on the way, and end with the weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import chaos
import psutil
import pytest
from processes import Command, ftlaunch
from ray_nodes import ray_nodes
from slow_steps import held, slow_steps
from tiny import recipe_for, write_recipe
from training import Trained, read_run, train

from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher.budget import Entry, read_failures

STEPS = 32
STEP_S = 0.4
HANG_S = 4.0
TENSORS = ("model.safetensors", "training/exp_avg.safetensors", "training/exp_avg_sq.safetensors")


def recipe(folder: Path, name: str, **cluster: object) -> dict[str, object]:
    made = recipe_for(folder, train={"max_steps": STEPS}, checkpoint={"every_steps": 5}, cluster=cluster)
    return {**made, "name": name, "data": {**made["data"], "reader_processes": 0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def undisturbed(folder) -> Trained:
    return train(recipe(folder, "undisturbed", type="local"), 2)


def start(folder: Path, name: str, variables: dict[str, str] | None = None, **cluster: object) -> Command:
    write_recipe(folder / f"{name}.yaml", recipe(folder, name, **cluster))
    return Command(ftlaunch(f"{name}.yaml"), folder, variables or slow_steps(folder, STEP_S, PATH))


PATH = os.environ.get("PYTHONPATH", "")


def lines(directory: Path) -> list[dict[str, object]]:
    log = directory / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""  # a line may be on its way
    return [json.loads(line) for line in whole.splitlines()]


def reached(directory: Path, step: int, attempt: int = 1) -> bool:
    """Whether an attempt (or a later one) has taken a step."""
    return any(
        line["kind"] == "step" and line["step"] >= step and line["attempt"] >= attempt for line in lines(directory)
    )


def after(command: Command, directory: Path, step: int, attempt: int = 1) -> None:
    assert command.wait_until(lambda: reached(directory, step, attempt)), command.text


def family(command: Command) -> list[psutil.Process]:
    return psutil.Process(command.process.pid).children(recursive=True)


def ranks(command: Command) -> list[psutil.Process]:
    """In the order of their ids, which is that of their starts."""
    return chaos.ranks(family(command))


def standing_by(command: Command) -> list[psutil.Process]:
    """Those that may become ranks, and whose imports are done or under way."""
    return [one for one in family(command) if "StandingBy" in " ".join(one.cmdline()) and not chaos.is_rank(one)]


def failures(directory: Path) -> list[Entry]:
    return read_failures(RunDirectory(str(directory)))


def final(directory: Path) -> dict[str, bytes]:
    checkpoint = read_run(directory).checkpoint
    assert checkpoint.name.startswith(f"step-{STEPS:06d}")
    return {name: (checkpoint / name).read_bytes() for name in TENSORS}


def last_losses(directory: Path) -> list[float]:
    """Of every step, by the attempt that counts."""
    by_step = {line["step"]: line["loss"] for line in lines(directory) if line["kind"] == "step"}
    assert sorted(by_step) == list(range(1, STEPS + 1))
    return [by_step[step] for step in sorted(by_step)]


def test_a_rank_hangs_ray_ends_and_the_driver_is_killed(folder, undisturbed):
    """Three faults in one run on this machine; all steps run at the same world size, so the weights are bitwise the
    same."""
    directory = folder / "runs" / "three-faults"
    soon = slow_steps(folder, STEP_S, PATH, standby_after_s=0.5)
    cluster = {"type": "local", "processes_per_node": 2, "gpus_per_node": 0, "hang_timeout_s": HANG_S}
    command = start(folder, "three-faults", soon, **cluster)
    after(command, directory, 6)
    assert command.wait_until(lambda: len(standing_by(command)) == 2)
    first = ranks(command)
    first[1].suspend()
    after(command, directory, 8, attempt=2)
    assert not {one.pid for one in ranks(command)} & {one.pid for one in first}
    assert all("StandingBy" in " ".join(one.cmdline()) for one in ranks(command)), "they were there before"
    [head] = [one for one in family(command) if one.name() == "gcs_server"]
    head.kill()
    after(command, directory, 10, attempt=3)
    [driver] = psutil.Process(command.process.pid).children()
    driver.kill()
    assert command.wait() == 0, command.text

    assert final(directory) == final(undisturbed.directory), command.text
    assert last_losses(directory) == undisturbed.losses
    found = failures(directory)
    assert [(one.kind, one.by) for one in found] == [("hang", "ranks"), ("driver", "driver"), ("driver", "driver")]
    assert len({one.launch for one in found}) == 1
    own, stood_by, *_ = RunDirectory(str(directory)).attempts()
    assert own.began is None and stood_by.began > stood_by.process.started
    assert "Ray has ended, and its driver with it" in found[1].says
    [stacks] = (directory / "stacks").glob("*.txt")
    text = stacks.read_text()
    assert "state T (stopped)" in text
    assert "=== rank 0" in text
    said = " ".join(command.text.split())
    assert "does not answer; rank" in said
    assert re.search(r"waits in all_\w+ \(in \S+\)", said)
    assert re.search(r"all ranks are started again, from .* \(restart 1 of 3\)", said)
    assert "the driver was killed (SIGKILL); it is started again, from step" in said


def test_nodes_are_lost_come_and_are_taken_away(folder, undisturbed):
    """One of two raylets is killed: the run goes on with the other; grows when another comes; and leaves one that is
    to be taken away, after saving."""
    directory = folder / "runs" / "nodes"
    slow = slow_steps(folder, 2 * STEP_S, PATH)
    with ray_nodes(folder, "one", "two", environment={**slow, "OMP_NUM_THREADS": "1"}) as cluster:
        nodes = {"min": 1, "max": 2, "grow_after_s": 2.0}
        variables = {**cluster.variables, **slow}
        command = start(
            folder, "nodes", variables, type="ray", address=cluster.address, nodes=nodes, gpus_per_node=0, doctor=False
        )
        after(command, directory, 6)
        cluster.lose("two")
        after(command, directory, 6, attempt=2)
        with held(folder):
            cluster.add("three")
        after(command, directory, 7, attempt=3)
        cluster.drain("one")
        assert command.wait() == 0, command.text
    worlds = [json.loads(path.read_text())["world_size"] for path in sorted((directory / "attempts").glob("a?.json"))]
    assert worlds == [2, 1, 2, 1], command.text
    assert "raylet" not in command.text  # what Ray's services have to say of it helps nobody here
    found = failures(directory)
    assert [one.kind for one in found if not one.counts] == ["resize", "preempted"]
    assert found[0].kind in ("node", "killed")
    assert len(found) == 3
    # Each goes on behind the newest checkpoint; who moves has saved first, so that nothing is taken again.
    taken = [(line["attempt"], line["step"]) for line in lines(directory) if line["kind"] == "step"]
    for attempt, failure in enumerate(found, 2):
        assert min(step for number, step in taken if number == attempt) == failure.step + 1
        if not failure.counts:
            assert max(step for number, step in taken if number == attempt - 1) == failure.step
    # Sums over other numbers of ranks are rounded otherwise.
    assert last_losses(directory) == pytest.approx(undisturbed.losses, rel=1e-5)


def test_a_run_that_waits_for_a_lost_node_can_be_stopped(folder):
    """Nothing is lost by it, so nobody has to ask twice."""
    directory = folder / "runs" / "short-of-one"
    slow = slow_steps(folder, STEP_S, PATH)
    with ray_nodes(folder, "one", "two", environment={**slow, "OMP_NUM_THREADS": "1"}) as cluster:
        settings = {"type": "ray", "address": cluster.address, "nodes": 2, "gpus_per_node": 0, "doctor": False}
        command = start(folder, "short-of-one", {**cluster.variables, **slow}, **settings)
        after(command, directory, 6)
        cluster.lose("two")
        assert command.wait_until(lambda: "waiting for nodes: 1 of 2 are there" in command.text), command.text
        command.interrupt()
        assert command.wait() == 130, command.text
    assert command.text.count("waiting for nodes") == 1
    assert "stopping after this step" not in command.text
    [lost] = failures(directory)
    assert lost.kind in ("node", "killed")
    assert lost.step == 5


def test_a_failure_that_comes_back_ends_the_run(folder):
    directory = folder / "runs" / "spent"
    command = start(folder, "spent", type="local", processes_per_node=2, gpus_per_node=0, max_restarts=0)
    after(command, directory, 2)
    os.kill(ranks(command)[0].pid, signal.SIGKILL)
    assert command.wait() == 2, command.text
    said = " ".join(command.text.split())
    assert "the process was killed; the ranks are not started again" in said
    assert "cluster.max_restarts" in said
    assert [one.counts for one in failures(directory)] == [True]
