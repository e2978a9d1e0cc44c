"""Slurm's commands: what is asked of them, and what their words mean."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..recipes.errors import InfrastructureError, UserError

ANSWER_S = 120.0
"""For Slurm to answer; controllers of large sites take many seconds when they are busy."""

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED")
RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING")
CANCELLED = ("CANCELLED", "REVOKED")

UNREACHABLE = re.compile(
    r"unable to contact slurm controller|socket timed out|connection refused|communication connection failure"
    r"|zero bytes were transmitted|resource temporarily unavailable|slurm backup controller in standby"
    r"|unable to establish (control|configuration) (machine|source)|temporarily unable",
    re.IGNORECASE,
)
"""Of a controller that may answer later."""

GONE = re.compile(r"invalid job id", re.IGNORECASE)

REASONS = {
    "Resources": "nodes are busy",
    "Priority": "others come first",
    "BeginTime": "it may not begin yet; after a requeue Slurm waits some minutes",
    "Dependency": "it waits for another job",
    "ReqNodeNotAvail": "nodes are down, drained or reserved",
    "PartitionTimeLimit": "cluster.time is above the limit of the partition: it will not start",
    "PartitionNodeLimit": "cluster.nodes is outside the bounds of the partition: it will not start",
    "PartitionConfig": "the partition's limits of time or nodes do not allow it: it will not start",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "NodeDown": "a node that it needs is down",
    "BadConstraints": "no node has what is asked for: it will not start",
    "InvalidAccount": "cluster.account is not valid: it will not start",
    "InvalidQOS": "cluster.qos is not valid: it will not start",
    "Reservation": "it waits for its reservation",
    "JobHeldUser": "it is held: scontrol release",
    "JobHeldAdmin": "an administrator holds it",
    "Licenses": "licences are in use",
}
"""Slurm's word for why a job waits -> what that means. Limits of an account or a QOS are recognised by their form."""

_LIMIT = re.compile(r"^(Assoc|QOS|MaxJobs|MaxNode|MaxCpu|MaxGRES|Grp)")


@dataclass(frozen=True)
class Standing:
    """Of a job, in Slurm's words. `start`: when it began or is expected to; empty: Slurm does not know."""

    state: str
    reason: str = ""
    start: str = ""
    nodes: str = ""
    partition: str = ""

    @property
    def waits(self) -> bool:
        """Whether it has no nodes yet, or no more."""
        return self.state in WAITING

    @property
    def runs(self) -> bool:
        """Whether it has nodes."""
        return self.state in RUNNING

    @property
    def is_over(self) -> bool:
        """Whether it has ended, for good."""
        return not self.waits and not self.runs

    @property
    def why(self) -> str:
        """Why it waits, for people."""
        word = self.reason.partition(",")[0].strip("()")
        known = REASONS.get(word) or ("a limit of the account or QOS is reached" if _LIMIT.match(word) else "")
        return f"{self.reason} ({known})" if known else self.reason or "Slurm has not looked at it yet"

    def __str__(self) -> str:
        if self.waits:
            expected = f"expected to start {self.start}" if self.start else "Slurm has no expected start yet"
            where = f" of partition {self.partition}" if self.partition else ""
            return f"waits in the queue{where}: {self.why}; {expected}"
        return f"runs on {self.nodes}" if self.runs else f"is over: {self.state}"


FORMAT = "%T|%S|%N|%P|%r"


def parse_standing(line: str) -> Standing:
    """A line of squeue in our format; the reason comes last, because it may hold anything."""
    state, start, nodes, partition, reason = line.strip().split("|", 4)
    return Standing(
        state=state,
        start="" if start in ("N/A", "Unknown") else start.replace("T", " "),
        nodes=nodes,
        partition=partition,
        reason="" if reason == "None" else reason,
    )


@dataclass(frozen=True)
class Partition:
    """A partition, and how many nodes it has whatever their state."""

    name: str
    nodes: int
    is_default: bool


def parse_partitions(text: str) -> dict[str, Partition]:
    """What `sinfo` lists, by name; of several lines of a partition the nodes are added."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, nodes = line.rsplit("|", 1)
        before = found.get(name.rstrip("*"))
        count = int(nodes) + (before.nodes if before else 0)
        found[name.rstrip("*")] = Partition(name.rstrip("*"), count, name.endswith("*"))
    return found


def partition_problems(wanted: str | None, nodes: int, known: Mapping[str, Partition]) -> list[str]:
    """Why a job of so many nodes has no place in the partitions that are wanted (with commas; None: the default)."""
    names = wanted.split(",") if wanted else [one.name for one in known.values() if one.is_default]
    there_are = f"there are: {', '.join(known)}" if known else "this cluster has none that you may use"
    found = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            found.append(f"cluster.partition: Slurm knows no partition {name}; {meant}{there_are}")
    most = max((known[name].nodes for name in names if name in known), default=None)
    if most is not None and nodes > most and not found:
        found.append(
            f"cluster.nodes: {nodes} nodes are asked for, partition {' and '.join(names)} has {most}. Ask for fewer "
            f"(--nodes {most}), or name another partition; {there_are}"
        )
    return found


class Commands:
    """Slurm's commands on this machine. `environ`: theirs; None: this process's."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        # What a user has set for squeue by hand would hide jobs from us.
        kept = {name: value for name, value in (environ or {}).items() if not name.startswith(("SQUEUE_", "SINFO_"))}
        self._environ = kept or None

    @property
    def folder(self) -> str | None:
        """Where they are."""
        path = self._environ.get("PATH") if self._environ else None
        found = shutil.which("sbatch", path=path)
        return str(Path(found).parent) if found else None

    def submit(self, script: Path, without: Iterable[str]) -> tuple[str, str]:
        """(job id, what sbatch has to say besides). `without`: variables that would overrule the script. Raises
        UserError with sbatch's words where it is refused."""
        environ = {name: value for name, value in (self._environ or {}).items() if name not in set(without)}
        done = self._run(["sbatch", "--parsable", str(script)], environ or None)
        if done.returncode:
            raise UserError(f"Slurm does not take the job: {_words(done)}")
        return done.stdout.strip().splitlines()[-1].partition(";")[0], done.stderr.strip()

    def look(self, job: str) -> Standing | None:
        """How a job stands; None: Slurm knows it no more."""
        done = self._run(["squeue", "--noheader", "--states=all", f"--jobs={job}", f"--format={FORMAT}"])
        if done.returncode and not GONE.search(done.stderr):
            raise InfrastructureError(f"squeue: {_words(done)}")
        lines = done.stdout.strip().splitlines()
        return parse_standing(lines[0]) if lines and not done.returncode else None

    def partitions(self) -> dict[str, Partition]:
        """Those that this user may see."""
        done = self._run(["sinfo", "--noheader", "--format=%P|%D"])
        if done.returncode:
            raise InfrastructureError(f"sinfo: {_words(done)}")
        return parse_partitions(done.stdout)

    def cancel(self, job: str) -> None:
        """End a job, whether it runs or not."""
        self._told(["scancel", job])

    def signal(self, job: str, name: str) -> None:
        """Send a signal to a running job's script, and to nothing else of it."""
        self._told(["scancel", "--batch", f"--signal={name}", job])

    def _told(self, command: Sequence[str]) -> None:
        done = self._run(command)
        if done.returncode and not re.search(r"invalid job id|already completing|already completed", done.stderr, re.I):
            raise InfrastructureError(f"{command[0]}: {_words(done)}")

    def _run(
        self, command: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        environ = environ or self._environ
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, timeout=ANSWER_S,
                env=dict(environ) if environ else None, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError:
            raise UserError(
                f"{command[0]} is not on this machine: run ftlaunch on a login node of the Slurm cluster, or put the "
                "folder of Slurm's commands on PATH"
            ) from None
        except subprocess.TimeoutExpired:
            raise InfrastructureError(f"{command[0]} did not answer within {ANSWER_S:g} s") from None
        if done.returncode and UNREACHABLE.search(done.stderr):
            raise InfrastructureError(f"{command[0]}: {_words(done)}")
        return done


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """What a command has to say, without its own name before every line."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in done.stderr.strip().splitlines()]
    return "; ".join(line for line in lines if line) or f"exit code {done.returncode}"
