"""Nodes for `recovery`: a Ray cluster of several raylets, or agents of torchrun, on this machine, that can be lost."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from harness import program

WAIT_S = 240.0
LATE_BYTES = 1 << 16


class Program:
    """A command in a session of its own, its output in a file."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._output = Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                list(command), cwd=folder, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self._output.read_text(errors="replace")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, happened: Callable[[], bool], what: str) -> None:
        """Poll fast. Ends the benchmark if it ends first, or never happens."""
        deadline = time.monotonic() + WAIT_S
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise SystemExit(f"{what} did not happen:\n{self.text[-6000:]}")
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL to all of it."""
        family = [*self.children(), psutil.Process(self.process.pid)] if self.process.poll() is None else []
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


@dataclass
class RayNodes:
    """A Ray cluster whose head offers nothing."""

    folder: Path
    address: str = ""
    nodes: list[Program] = field(default_factory=list)

    def start(self, *arguments: str) -> Program:
        """One `ray start`, until it is up."""
        ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        node = Program([program("ray"), "start", *arguments, "--block", *ports], self.folder, RAY)
        node.wait_for(lambda: "Ray runtime started" in node.text, "ray start")
        self.nodes.append(node)
        return node

    def add(self) -> None:
        """One more node."""
        self.start(f"--address={self.address}", "--num-cpus=1")

    def lose_last(self) -> None:
        """SIGKILL to all that runs on the last node."""
        self.nodes.pop().kill()


RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def ray_nodes(folder: Path, count: int) -> Iterator[RayNodes]:
    """So many nodes of one core."""
    with tempfile.TemporaryDirectory(prefix="r") as short:
        cluster = RayNodes(folder)
        try:
            head = cluster.start(
                "--head", "--num-cpus=0", "--port=0", "--include-dashboard=false", f"--temp-dir={short}"
            )
            found = re.search(r"--address='([^']+)'", head.text)
            if found is None:
                raise SystemExit(head.text)
            cluster.address = found[1]
            for _ in range(count):
                cluster.add()
            yield cluster
        finally:
            for node in reversed(cluster.nodes):
                node.kill()


def torchrun_agent(folder: Path, port: int, restarts: int = 3) -> Program:
    """One agent of an elastic torchrun of two, with one rank."""
    loop = str(Path(__file__).resolve().parent / "recovery_loop.py")
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "recovery"]
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", str(restarts)]
    return Program([program("torchrun"), *elastic, *rendezvous, loop, str(folder)], folder)


def holds(agent: Program, port: int) -> bool:
    """Whether this agent listens there, once one of them does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return bool(connection.pid == agent.process.pid)
        time.sleep(0.1)
    raise SystemExit("torchrun's rendezvous did not begin")


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def ranks_of(programs: list[Program]) -> list[psutil.Process]:
    """All that train, the last started last."""
    found = [child for each in programs for child in each.children() if is_rank(child)]
    return sorted(found, key=lambda process: process.create_time())


def is_rank(process: psutil.Process) -> bool:
    """Whether this is one of the processes that train. Of ours one that stands by may become one: then it prints into a
    rank's log."""
    try:
        words = " ".join(process.cmdline())
        prints = str(Path(f"/proc/{process.pid}/fd/1").readlink())
    except (psutil.Error, OSError):
        return False
    if "StandingBy" in words:
        return "rank-" in prints
    return "RayTrainWorker" in words or ("recovery_loop.py" in words and "torchrun" not in words)


def last_step(log: Path) -> int:
    """The last one that a side has written down; 0: none yet."""
    return next(_steps(log), 0)


def most_steps(log: Path) -> int:
    """The highest one of late."""
    return max(_steps(log), default=0)


def _steps(log: Path) -> Iterator[int]:
    """Those of the last lines, the latest first: logs grow long, and are looked at all the time."""
    if not log.exists():
        return
    with log.open("rb") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - LATE_BYTES)
        file.seek(begin)
        lines = file.read().rpartition(b"\n")[0].split(b"\n")
    for text in reversed(lines[1:] if begin else lines):
        line = json.loads(text) if text else {}
        if line.get("kind", "step") == "step" and "step" in line:
            yield int(line["step"])
