"""The second step of a `slurm` job: a keeper on each node, which starts Ray there, on the first one the driver too.
`keep JOB START`. The first node writes START/code, the run's exit code; its own is 0 then, because others would be
killed before they have cleaned up.

What all nodes said in the first step is read by all, and judged by all alike; the first one says what is wrong. Slurm
watches over the keepers, so there is no lease and nobody to let go, unlike on SSH hosts; everything else is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from .host_agent import JOB, end_processes, forget, put, scratch
from .host_keeper import Keeper
from .restarts import BEGUN, EARLY, ELSEWHERE, LEFT, LEFT_EARLY, UNFIT
from .slurm_checks import Said, addresses, demand_of, lacking, problems

FILES_S = 60.0
"""For a file that another node has written to show here: clients of network file systems look again after some time."""

TRY_AGAIN_S = 0.2
FIRST = 0
CODE = "code"
LOST = "a node of the job, or all of it, was lost"
MISTAKE, FAILED, INTERRUPTED = 1, 2, 130


def main() -> int:
    """Judge, keep, and clean up."""
    job, start = Path(sys.argv[1]), Path(sys.argv[2])
    number = int(os.environ["SLURM_NODEID"])
    name = name_of(os.environ["SLURM_JOB_ID"], os.environ["SLURM_STEP_ID"], start.name, str(number))
    if os.environ.get(JOB) != name:
        # By this mark in its environment every process of the job is found, this one too: it has to be born with it.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, JOB: name})  # noqa: S606
    spec = json.loads((job / "spec.json").read_text())
    nodes = [json.loads(_read(start / f"node-{n}.json")) for n in range(int(os.environ["SLURM_STEP_NUM_NODES"]))]
    code, says = refusal(spec, nodes, start)
    if says:
        if number == FIRST:
            _say(f"error: {says}")
            put(start / CODE, str(code))
        return 0
    return _Node(job, start, name, number).keep(spec, nodes)


def refusal(spec: Mapping[str, Any], nodes: Sequence[Said], start: Path) -> tuple[int, str]:
    """Why nothing is started on these nodes, with the job's exit code; no words: something is."""
    wrong = lacking(nodes, spec["wanted"])
    if not wrong:
        from ..recipes.schema_cluster import SlurmCluster

        config = SlurmCluster.model_validate_json(json.dumps(spec["cluster"]))
        wrong = problems(config, spec, nodes)
    if wrong:
        return MISTAKE, "\n".join(["the nodes of this job do not fit:", *wrong])
    failed = failures(start)
    if len(failed) <= config.max_restarts:
        return 0, ""
    count = "a start" if len(failed) == 1 else f"{len(failed)} starts in a row"
    return FAILED, (
        f"{count} of this job ended before the run could go on, the last because {failed[0]}; it is not begun again "
        "(cluster.max_restarts)"
    )


def failures(start: Path) -> list[str]:
    """Why the starts of a job before this one ended, newest first, up to the last one that left its nodes as it should,
    or whose driver came so far as to have the run's budget count."""
    found: list[str] = []
    while (why := why_again(start := before(start))) and not (start / BEGUN).exists():
        found.append(why)
    return found


def before(start: Path) -> Path:
    """The folder of the start before one."""
    return start.with_name(f"start-{int(start.name.rpartition('-')[2]) - 1}")


def _say(text: str) -> None:
    """Into the job's log."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def name_of(*parts: str) -> str:
    """What this node's part of a start is called on it. Sockets lie below a folder of that name, so it is short."""
    return hashlib.sha256(".".join(parts).encode()).hexdigest()[:8]


def _read(path: Path) -> str:
    deadline_s = time.monotonic() + FILES_S
    while True:
        try:
            return path.read_text()
        except FileNotFoundError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(TRY_AGAIN_S)


class _Node:
    """This node's part of one start of a job. `job` and `start` are seen by all nodes."""

    def __init__(self, job: Path, start: Path, name: str, number: int) -> None:
        self._job, self._start, self._name, self._number = job, start, name, number
        self._folder = scratch() / name
        self._names: dict[str, str] = {}
        """Slurm's names of the nodes, by their addresses."""

    def keep(self, spec: Mapping[str, Any], nodes: Sequence[Said]) -> int:
        """Until it is over; the exit code."""
        self._folder.mkdir(mode=0o700)
        (self._folder / "keeper.pid").write_text(str(os.getpid()))
        try:
            self._lay_out(spec, nodes)
            told = json.loads((self._folder / "keeper.json").read_text())
            keeper = JobKeeper(self._folder, told, self._start, why_again(before(self._start)))
            why = keeper.run()
        finally:
            end_processes(self._name)
            forget(self._folder, whole=False)
        return self._ended(keeper, why) if self._number == FIRST else 0

    def _lay_out(self, spec: Mapping[str, Any], nodes: Sequence[Said]) -> None:
        """The files of `ssh_job.JobPlan`, as a launcher would over SSH."""
        from ..recipes.schema_cluster import SlurmCluster
        from .ssh_job import JobPlan, Node

        ways = addresses(nodes)
        self._names = {address: name for name, address in ways.items()}
        plan = JobPlan(
            job=self._name,
            nodes=tuple(
                Node(said["name"], said["executable"], str(self._folder), ways[said["name"]]) for said in nodes
            ),
            port=nodes[FIRST]["port"],
            demand=demand_of(SlurmCluster.model_validate_json(json.dumps(spec["cluster"])), nodes),
            entry=spec["entry"],
            folder=spec["from"],
            environ=json.loads((self._job / "env.json").read_text()),
        )
        driver = self._driver(asdict(plan.demand), nodes[FIRST]["name"]) if self._number == FIRST else {}
        for name, content in plan.files(self._number, (self._job / "token").read_text(), driver, {}).items():
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(content)
        (self._folder / "driver.log").symlink_to(self._job / "driver.log")

    def _driver(self, demand: Mapping[str, Any], node: str) -> dict[str, Any]:
        """What the driver is told: what was known at submission, and what is only known here."""
        told = json.loads((self._job / "driver.json").read_text())
        job = told["record"]["job"] or os.environ["SLURM_JOB_ID"]
        return {**told, "demand": demand, "record": {**told["record"], "job": job, "driver": node}}

    def _ended(self, keeper: JobKeeper, why: str) -> int:
        code = INTERRUPTED
        try:
            code = int((self._folder / "exit").read_text())
        except OSError:
            if not keeper.asked:
                _say(f"error: {why}; the driver did not come to its end")
                return 1
        if code == ELSEWHERE:
            unfit = (self._folder / UNFIT).read_text().split()
            put(self._start / UNFIT, ",".join(self._names[address] for address in unfit if address in self._names))
        put(self._start / CODE, str(outcome(code, keeper.asked)))
        return 0


def why_again(start: Path) -> str | None:
    """Why the start of a job that left this folder is followed by another, as `launcher/drive.py` has it; empty: it was
    asked to leave, and got further. None: there was none."""
    if not start.is_dir():
        return None
    was_asked, code = (start / "asked").exists(), ""
    with suppress(OSError):
        code = (start / CODE).read_text()
    if not was_asked and (not code or (start / "lost").exists()):
        return LOST
    return f"{EARLY} (is cluster.time too short?)" if code == str(LEFT_EARLY) else ""


def outcome(code: int, asked: str) -> int:
    """What a run comes to whose driver ended with this code, and of which this was asked. Pure."""
    if code in (0, MISTAKE):
        return code
    if asked == "leave":
        return code if code == LEFT else LEFT_EARLY
    if asked:
        return INTERRUPTED
    return code if code in (FAILED, INTERRUPTED, ELSEWHERE) else FAILED


class JobKeeper(Keeper):
    """A keeper that is asked by the job's script, through a file, or by SIGTERM."""

    # Before Slurm takes nodes away it sends SIGTERM to every process of a step. The ranks are to save first.
    shielded = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})

    def __init__(self, folder: Path, spec: Mapping[str, Any], start: Path, again: str | None) -> None:
        super().__init__(folder, spec)
        self._start, self._again = start, again
        self._terminated = self._begun = False
        (folder / "released").touch()
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._terminated = True

    @property
    def asked(self) -> str:
        """What is asked of the run; empty: nothing."""
        with suppress(OSError):
            return (self._start / "asked").read_text()
        return "leave" if self._terminated else ""

    def _drive(self, *again: str) -> None:
        if not again and self._again is not None:
            again = (self._again,)  # the first driver of this start, but not of the job
        super()._drive(*again)

    def _told(self) -> str | None:
        if self._driver is None and (self._start / CODE).exists():  # else they would see that its Ray has ended, later
            return "the job has ended"
        if not self._begun and self._has(BEGUN):
            with suppress(OSError):
                (self._start / BEGUN).touch()  # where the nodes of the next start look
                self._begun = True
        asked = self.asked if self._driver else ""
        if asked == "now":
            return "stopped"
        if asked and self._driver and not self._stopped:
            self._driver.send_signal(signal.SIGUSR1 if asked == "leave" else signal.SIGINT)
            self._stopped = True
        return None
