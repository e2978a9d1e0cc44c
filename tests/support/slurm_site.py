"""A real Slurm: a controller here, and a slurmd on each of some hosts (`ssh_hosts.py`), with a munge of its own.

Nothing of the machine's own Slurm is read or written. Needs root, slurm-wlm and munge.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from processes import environment
from ssh_hosts import Hosts, ssh_hosts

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "munged")
WAIT_S = 60.0
KILL_WAIT_S = 20
GRACE_S = 120
"""For jobs of partition `batch` to leave nodes that partition `urgent` wants."""

REQUEUE_S = 5
"""How long Slurm lets a job wait after a requeue, at the least; by default two minutes."""

CONF = """
ClusterName=ft
SlurmctldHost={host}({controller})
SlurmUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_s}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/task_prolog
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
KillWait={kill_wait_s}
MessageTimeout=100
ReturnToService=2
JobRequeue=1
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes={names} Default=YES State=UP GraceTime={grace_s}
PartitionName=tiny Nodes={first} MaxTime=5 State=UP
PartitionName=urgent Nodes={names} State=UP PriorityTier=10
"""

CORES = 8
"""That each node is said to have: two jobs fit on it."""

TASK_PROLOG = """#!/bin/sh
echo "export TMPDIR={scratch}"
"""
"""As sites do that give every job a temporary folder of its own."""


@dataclass
class Site:
    """The nodes, and what a user of the cluster has in the environment."""

    folder: Path
    hosts: Hosts
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, str]:
        """Of whoever uses it from this machine."""
        return environment({"SLURM_CONF": str(self.folder / "slurm.conf")})

    def cluster(self, **changes: Any) -> dict[str, Any]:
        """The `cluster` section of a recipe that runs on all nodes."""
        return {"type": "slurm", "nodes": len(self.hosts.names), "gpus_per_node": 0, "doctor": False, **changes}

    def run(self, *command: str, environ: Mapping[str, str] | None = None) -> str:
        """One of Slurm's commands; what it prints."""
        done = subprocess.run(
            command,
            env={**self.environ, **(environ or {})},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def jobs(self) -> list[str]:
        """Of all that are not over."""
        return self.run("squeue", "--noheader", "--format=%i").split()

    def start(self, *command: str, environ: Mapping[str, str] | None = None) -> None:
        """A daemon of ours."""
        name = Path(command[0]).name
        with (self.folder / f"{name}.out").open("wb") as output:
            self.processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(environ or {})})
            )

    def wait(self) -> None:
        """Until all nodes are idle."""
        deadline = time.monotonic() + WAIT_S
        while True:
            done = subprocess.run(
                ["sinfo", "--noheader", "--Node", "--partition=batch", "--format=%T"],
                env=self.environ, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.stdout.split() == ["idle"] * len(self.hosts.names):
                return
            logs = {path.name: path.read_text()[-2000:] for path in self.folder.glob("*.log")}
            assert time.monotonic() < deadline, (done.stdout, done.stderr, logs)
            time.sleep(0.1)

    def left(self) -> dict[str, list[str]]:
        """Commands of ours that still run, by host."""
        members = self.hosts.members.items()
        found = {name: [*host.processes("ray"), *host.processes("ftlaunch")] for name, host in members}
        return {name: commands for name, commands in found.items() if commands}


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("", 0))
        port: int = asked.getsockname()[1]
        return port


def write_conf(site: Site, names: Sequence[str]) -> None:
    """For hosts that are numbered as `Hosts.add` does."""
    subnet = site.hosts.subnet
    nodes = [
        f"NodeName={name} NodeAddr={subnet}.{number} CPUs={CORES} RealMemory=4000 Weight={number} State=UNKNOWN"
        for number, name in enumerate(names, 1)
    ]
    text = CONF.format(
        host=socket.gethostname(), controller=f"{subnet}.254", port=free_port(), folder=site.folder,
        names=",".join(names), nodes="\n".join(nodes), first=names[0], kill_wait_s=KILL_WAIT_S, requeue_s=REQUEUE_S,
        grace_s=GRACE_S,
    )  # fmt: skip
    (site.folder / "slurm.conf").write_text(text)
    prolog = site.folder / "task_prolog"
    prolog.write_text(TASK_PROLOG.format(scratch=site.hosts.scratch))
    prolog.chmod(0o755)
    (site.folder / "state").mkdir()


def start_munge(site: Site) -> None:
    """With a key and a socket of its own."""
    folder = site.folder
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    files = [f"--{name}={folder}/munge.{end}" for name, end in (("key-file", "key"), ("pid-file", "pid"))]
    files += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed", f"--socket={folder}/munge.socket"]
    site.start("munged", "--foreground", "--force", *files)


@contextmanager
def slurm_site(*names: str) -> Iterator[Site]:
    """Nodes of these names. Skips where they cannot be made."""
    if missing := [program for program in NEEDED if shutil.which(program) is None]:
        pytest.skip(f"a Slurm needs {', '.join(missing)} (Debian: slurm-wlm munge)")
    with ssh_hosts() as hosts:
        site = Site(hosts.folder / "slurm", hosts)
        site.folder.mkdir()
        try:
            write_conf(site, names)
            start_munge(site)
            for name in names:
                hosts.add(name, f"slurmd -D -N {name} -f {site.folder}/slurm.conf &")
            site.start("slurmctld", "-D", "-f", str(site.folder / "slurm.conf"))
            site.wait()
            yield site
        finally:
            for process in reversed(site.processes):
                process.kill()
                process.wait()
