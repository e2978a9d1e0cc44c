"""Runs that are disturbed: where they run, what can happen to them there, and what is looked at in the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from processes import Command, ftlaunch
from ssh_hosts import Hosts
from tiny import recipe_for, write_recipe
from training import Trained, read_run

from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher.budget import read_failures

CUT_OFF_S = 15.0
"""Longer than a node that is silent is borne."""

HANG_S = 10.0


def steps_of(directory: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl about steps."""
    log = directory / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""  # a line may be on its way
    lines = map(json.loads, whole.splitlines())
    return [line for line in lines if line["kind"] == "step"]


def reached(directory: Path, step: int, attempt: int) -> bool:
    """Whether an attempt (or a later one) has taken a step."""
    return any(line["step"] >= step and line["attempt"] >= attempt for line in steps_of(directory))


def attempts(directory: Path) -> int:
    """How often the ranks were started."""
    return len([path for path in (directory / "attempts").glob("a*.json") if path.name.count(".") == 1])


def named(processes: Sequence[psutil.Process], name: str) -> psutil.Process:
    """The only one that runs a program."""
    [found] = [process for process in processes if _name(process) == name]
    return found


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def ranks(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that train, in the order in which they were started."""
    return sorted((one for one in processes if "RayTrainWorker" in _words(one)), key=lambda one: one.pid)


@dataclass
class Local:
    """Two ranks on this machine."""

    folder: Path
    variables: dict[str, str]
    kind: str = "local"
    world: int = 2

    @property
    def cluster(self) -> dict[str, Any]:
        return {"type": "local", "processes_per_node": 2, "gpus_per_node": 0, "hang_timeout_s": HANG_S}

    def disturb(self, fault: str, command: Command) -> None:
        """Let it happen."""
        root = psutil.Process(command.process.pid)
        family = root.children(recursive=True)
        match fault:
            case "worker SIGKILL":
                ranks(family)[-1].kill()
            case "worker SIGSTOP":
                ranks(family)[0].suspend()
            case "driver SIGKILL":
                root.children()[0].kill()
            case "raylet SIGKILL":
                named(family, "raylet").kill()
            case "head SIGKILL":
                named(family, "gcs_server").kill()


@dataclass
class OverSsh:
    """Three hosts with a rank each."""

    folder: Path
    hosts: Hosts
    variables: dict[str, str] = field(default_factory=dict)
    kind: str = "ssh"
    world: int = 3

    @property
    def cluster(self) -> dict[str, Any]:
        return {**self.hosts.cluster(env=["OMP_NUM_THREADS", "HF_HUB_*"]), "hang_timeout_s": HANG_S}

    def disturb(self, fault: str, _command: Command) -> None:
        """Let it happen."""
        alpha, beta, gamma = self.hosts.members.values()
        match fault:
            case "worker SIGKILL":
                ranks(beta.found(""))[0].kill()
            case "worker SIGSTOP":
                ranks(gamma.found(""))[0].suspend()
            case "raylet SIGKILL":
                gamma.end_program("raylet")
            case "host cut off":
                beta.cut_off()
                time.sleep(CUT_OFF_S)
                beta.plug_in()
            case "driver SIGKILL":
                assert alpha.end("bin/drive") == 1
            case "head SIGKILL":
                alpha.end_program("gcs_server")


Bed = Local | OverSsh


def recipe(folder: Path, name: str, steps: int, cluster: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Small, with a step that sums the same whatever the number of ranks is, to rounding that does not grow."""
    train = {"max_steps": steps, "global_batch_size": 24, "learning_rate": 1e-4}
    made = recipe_for(folder, train=train, checkpoint={"every_steps": 4}, cluster=cluster, **changes)
    return {**made, "name": name}


@dataclass(frozen=True)
class Outcome:
    """Of one disturbed run."""

    code: int
    text: str
    directory: Path
    worlds: list[int]


def disturb(bed: Bed, name: str, steps: int, plan: Sequence[tuple[int, str]]) -> Outcome:
    """Run with faults: (step after which it happens, which). Each waits until the ranks train again after the last."""
    write_recipe(bed.folder / f"{name}.yaml", recipe(bed.folder, name, steps, bed.cluster))
    directory = bed.folder / "runs" / name
    command = Command(ftlaunch(f"{name}.yaml"), bed.folder, bed.variables)
    attempt = 1
    for step, fault in plan:
        if not command.wait_until(lambda: reached(directory, step, attempt)):  # noqa: B023
            break
        attempt = attempts(directory) + 1
        bed.disturb(fault, command)
    code = command.wait()
    files = sorted((directory / "attempts").glob("a*.json"))
    worlds = [json.loads(path.read_text())["world_size"] for path in files if path.name.count(".") == 1]
    return Outcome(code, command.text, directory, worlds)


def compare(outcome: Outcome, undisturbed: Trained, steps: int, world: int) -> dict[str, Any]:
    """What the run came to, beside the undisturbed one."""
    trained = read_run(outcome.directory)
    taken = {line["step"]: line for line in steps_of(outcome.directory)}
    mine, theirs = trained.tensors, undisturbed.tensors
    differences = {name: float(_difference(mine[name], theirs[name])) for name in theirs}
    tokens = [(line["step"], line["tokens"], line["supervised_tokens"]) for line in undisturbed.steps]
    rows = [line["sources"] for line in trained.lines if line["kind"] == "data"]
    wanted = [line["sources"] for line in undisturbed.lines if line["kind"] == "data"]
    return {
        "exit_code": outcome.code,
        "worlds": outcome.worlds,
        "same_world": set(outcome.worlds) == {world},
        "steps": sorted(taken) == list(range(1, steps + 1)),
        "rows": [(step, line["tokens"], line["supervised_tokens"]) for step, line in sorted(taken.items())] == tokens
        and rows[-1] == wanted[-1],
        "bitwise": all(torch.equal(mine[name], theirs[name]) for name in theirs),
        "largest_difference": max(differences.values()),
        "failures": [
            {"kind": one.kind, "by": one.by, "node": one.node, "says": one.says, "from_step": one.step}
            for one in read_failures(RunDirectory(str(outcome.directory)))
        ],
    }


def _difference(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Relative to the tensor's largest element."""
    return (one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)


@contextmanager
def over_ssh(hosts: Hosts, folder: Path) -> Iterator[OverSsh]:
    """A bed that leaves no host cut off."""
    try:
        yield OverSsh(folder, hosts)
    finally:
        for host in hosts.members.values():
            host.plug_in()
