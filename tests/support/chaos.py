"""Runs that are disturbed: where they run, what can happen to them there, and what is looked at in the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch
from chaos_store import BUCKET, Store
from processes import Command, ftlaunch
from ssh_hosts import Hosts
from tiny import recipe_for, write_recipe
from training import Trained, read_run

from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher.budget import read_failures

CUT_OFF_S = 15.0
"""Longer than a node that is silent is borne."""

HANG_S = 10.0

DOWN_S = 60.0
"""For which an object store is not there."""

SLOW_S, SLOW_STOPPED_S, SLOW_RUNNING_S = 8.0, 0.4, 0.1
"""A slow rank is stopped for four fifths of the time."""

FULL_S = 15.0
"""For which a disk takes nothing."""

BORNE = ("slow rank", "disk full", "store down", "store silent")
"""Faults that ranks need not be started again for."""


def steps_of(directory: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl about steps."""
    log = directory / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""  # a line may be on its way
    lines = map(json.loads, whole.splitlines())
    return [line for line in lines if line["kind"] == "step"]


def named(processes: Sequence[psutil.Process], name: str) -> psutil.Process:
    """The one that runs a program. Raises Missing."""
    return one_of([process for process in processes if _name(process) == name], 0)


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
    return sorted((one for one in processes if is_rank(one)), key=lambda one: one.pid)


def is_rank(process: psutil.Process) -> bool:
    """Whether a process is a rank now: what ranks print goes into a log of theirs. One that only stands by prints into
    Ray's."""
    try:
        return "RayTrainWorker" in _words(process) and "rank-" in os.readlink(f"/proc/{process.pid}/fd/1")
    except OSError:
        return False


def patiently(disturb: Callable[[], None]) -> None:
    """Let a fault happen. Whom it hits may just be starting again after something else has happened."""
    deadline = time.monotonic() + DOWN_S
    while True:
        try:
            return disturb()
        except Missing:
            assert time.monotonic() < deadline, "it does not come back"
            time.sleep(0.1)


class Missing(Exception):
    """Whom a fault would hit is not there."""


def one_of(processes: Sequence[psutil.Process], index: int) -> psutil.Process:
    """Raises Missing where there is none."""
    if not processes:
        raise Missing
    return processes[index]


def slow_down(process: psutil.Process) -> None:
    """Have it run in bursts for a while."""
    deadline = time.monotonic() + SLOW_S
    with suppress(psutil.NoSuchProcess):  # it may end meanwhile
        while time.monotonic() < deadline:
            process.suspend()
            time.sleep(SLOW_STOPPED_S)
            process.resume()
            time.sleep(SLOW_RUNNING_S)


class Files:
    """A run in a folder of this machine, and what it has written."""

    folder: Path
    longer: Mapping[str, Any] = MappingProxyType({})
    """Changes of the recipe by which a step takes a while."""

    def recipe(self, name: str, steps: int, cluster: dict[str, Any]) -> dict[str, Any]:
        return recipe(self.folder, name, steps, cluster, **self.longer)

    def directory(self, name: str) -> Path:
        """The run directory."""
        return self.folder / "runs" / name

    def reached(self, name: str, step: int, attempt: int) -> bool:
        """Whether an attempt (or a later one) has taken a step."""
        time.sleep(0.05)  # whoever waits for it asks as fast as it is answered
        return any(line["step"] >= step and line["attempt"] >= attempt for line in steps_of(self.directory(name)))

    def attempts(self, name: str) -> int:
        """How often the ranks were started."""
        return len([path for path in (self.directory(name) / "attempts").glob("a*.json") if path.name.count(".") == 1])


@dataclass
class Local(Files):
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
                one_of(ranks(family), -1).kill()
            case "worker SIGSTOP":
                one_of(ranks(family), 0).suspend()
            case "slow rank":
                slow_down(one_of(ranks(family), 1))
            case "driver SIGKILL":
                one_of(root.children(), 0).kill()
            case "raylet SIGKILL":
                named(family, "raylet").kill()
            case "head SIGKILL":
                named(family, "gcs_server").kill()


@dataclass
class Stored(Local):
    """The same, with data and run directory in an object store. A step counts as reached with the checkpoint at or
    before it: the store is told of steps only then."""

    store: Store | None = None
    kind: str = "s3"

    def recipe(self, name: str, steps: int, cluster: dict[str, Any]) -> dict[str, Any]:
        assert self.store is not None
        made = super().recipe(name, steps, cluster)
        for source in made["data"]["train"]:
            source["path"] = self.store.put(Path(source["path"]))
        return {**made, "checkpoint": {**made["checkpoint"], "path": f"s3://{BUCKET}/runs"}}

    def directory(self, name: str) -> Path:
        """A copy of the run directory, made now."""
        assert self.store is not None
        return self.store.copy(f"runs/{name}", self.folder / "copies" / name)

    def reached(self, name: str, step: int, attempt: int) -> bool:
        assert self.store is not None
        time.sleep(0.2)
        commits = [json.loads(text)["directory"] for text in self.store.texts(f"runs/{name}/commits/")]
        places = [directory.removeprefix("step-").split(".a") for directory in commits]
        saved = max(SAVE_EVERY, step - step % SAVE_EVERY)
        return any(int(at) >= saved and int(by) >= attempt for at, by in places)

    def attempts(self, name: str) -> int:
        assert self.store is not None
        names = [key.rpartition("/")[2] for key in self.store.keys(f"runs/{name}/attempts/")]
        return len([one for one in names if one.endswith(".json") and one.count(".") == 1])

    def disturb(self, fault: str, command: Command) -> None:
        """Let it happen."""
        assert self.store is not None
        match fault:
            case "store down":
                self.store.refuse(DOWN_S)
            case "store silent":
                self.store.keep_silent(DOWN_S)
            case _:
                super().disturb(fault, command)


@dataclass
class OverSsh(Files):
    """Three hosts with a rank each."""

    folder: Path
    hosts: Hosts
    variables: dict[str, str] = field(default_factory=dict)
    kind: str = "ssh"
    world: int = 3
    longer = MappingProxyType({"data": {"sequence_length": 512}})  # no field

    @property
    def cluster(self) -> dict[str, Any]:
        return {**self.hosts.cluster(env=["OMP_NUM_THREADS", "HF_HUB_*"]), "hang_timeout_s": HANG_S}

    def disturb(self, fault: str, _command: Command) -> None:
        """Let it happen."""
        alpha, beta, gamma = self.hosts.members.values()
        match fault:
            case "worker SIGKILL":
                one_of(ranks(beta.found("")), 0).kill()
            case "worker SIGSTOP":
                one_of(ranks(gamma.found("")), 0).suspend()
            case "slow rank":
                slow_down(one_of(ranks(beta.found("")), 0))
            case "disk full":
                self.hosts.fill("gamma", FULL_S)
            case "raylet SIGKILL":
                named(gamma.found(""), "raylet").kill()
            case "host cut off":
                beta.cut_off()
                time.sleep(CUT_OFF_S)
                beta.plug_in()
            case "driver SIGKILL":
                one_of(alpha.found("bin/drive"), 0).kill()
            case "head SIGKILL":
                named(alpha.found(""), "gcs_server").kill()


Bed = Local | OverSsh

SAVE_EVERY = 4


def recipe(folder: Path, name: str, steps: int, cluster: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Small, with a step that sums the same whatever the number of ranks is, to rounding that does not grow."""
    train = {"max_steps": steps, "global_batch_size": 24, "learning_rate": 1e-4}
    made = recipe_for(folder, train=train, checkpoint={"every_steps": SAVE_EVERY}, cluster=cluster, **changes)
    return {**made, "name": name}


@dataclass(frozen=True)
class Outcome:
    """Of one disturbed run."""

    code: int
    text: str
    directory: Path
    worlds: list[int]
    happened: int
    """Faults; fewer than planned where it ended before the others."""


def disturb(bed: Bed, name: str, steps: int, plan: Sequence[tuple[int, str]]) -> Outcome:
    """Run with faults: (step after which it happens, which). Each waits until the ranks train again after the last."""
    write_recipe(bed.folder / f"{name}.yaml", bed.recipe(name, steps, bed.cluster))
    command = Command(ftlaunch(f"{name}.yaml"), bed.folder, bed.variables)
    attempt, happened = 1, 0
    for step, fault in plan:
        if not command.wait_until(lambda: bed.reached(name, step, attempt)):  # noqa: B023
            break
        attempt = bed.attempts(name) + (fault not in BORNE)
        patiently(partial(bed.disturb, fault, command))
        happened += 1
    code, directory = command.wait(), bed.directory(name)
    files = sorted((directory / "attempts").glob("a*.json"))
    worlds = [json.loads(path.read_text())["world_size"] for path in files if path.name.count(".") == 1]
    return Outcome(code, command.text, directory, worlds, happened)


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
        "happened": outcome.happened,
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
