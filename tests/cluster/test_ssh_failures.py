"""A run on hosts over SSH that loses a node's Ray, its driver and its head on the way, and ends by itself."""

from __future__ import annotations

import json
from pathlib import Path

from processes import Command, ftlaunch
from slow_steps import slow_steps
from ssh_hosts import Hosts
from tiny import recipe_for, write_recipe
from training import read_run, train

from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher.budget import read_failures

STEPS = 30
STEP_S = 0.3


def recipe(folder: Path, name: str, cluster: dict[str, object]) -> dict[str, object]:
    train_ = {"max_steps": STEPS, "global_batch_size": 6, "learning_rate": 1e-4}
    made = recipe_for(folder, train=train_, checkpoint={"every_steps": 5}, cluster=cluster)
    return {**made, "name": name}


def reached(directory: Path, step: int, attempt: int) -> bool:
    log = directory / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""  # a line may be on its way
    lines = map(json.loads, whole.splitlines())
    return any(line["kind"] == "step" and line["step"] >= step and line["attempt"] >= attempt for line in lines)


def test_ray_on_a_host_the_driver_and_the_head_are_lost(hosts: Hosts):
    work = hosts.folder / "lost"
    work.mkdir()
    cluster = hosts.cluster(env=["OMP_NUM_THREADS", "HF_HUB_*", "PYTHONPATH"])
    undisturbed = train(recipe(work, "undisturbed", {"type": "local"}), 3)
    write_recipe(work / "lost.yaml", recipe(work, "lost", cluster))
    directory = work / "runs" / "lost"
    command = Command(ftlaunch("lost.yaml"), work, slow_steps(work, STEP_S))

    def after(step: int, attempt: int) -> None:
        assert command.wait_until(lambda: reached(directory, step, attempt)), command.text

    after(6, 1)
    hosts.members["gamma"].end_program("raylet")
    after(12, 2)
    assert hosts.members["alpha"].end("bin/drive") == 1
    after(18, 3)
    hosts.members["alpha"].end_program("gcs_server")
    assert command.wait() == 0, command.text

    disturbed = read_run(directory)
    for part in ("model.safetensors", "training/exp_avg.safetensors", "training/exp_avg_sq.safetensors"):
        assert (disturbed.checkpoint / part).read_bytes() == (undisturbed.checkpoint / part).read_bytes(), part
    losses = {line["step"]: line["loss"] for line in disturbed.steps}
    assert [losses[step] for step in sorted(losses)] == undisturbed.losses
    found = read_failures(RunDirectory(str(directory)))
    assert [one.by for one in found] == ["ranks", "driver", "driver"]
    assert found[0].node == "gamma"
    assert "Ray on the first host has ended" in found[2].says
    assert len(list((directory / "submissions").glob("*.end.json"))) == 1
    assert [host.processes("ray") for host in hosts.members.values()] == [[], [], []]
