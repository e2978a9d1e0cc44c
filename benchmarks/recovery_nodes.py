"""Nodes for `recovery`: a Ray cluster of several raylets, or agents of torchrun, on this machine, that can be lost."""

from __future__ import annotations

import os
import re
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

    def lose_last(self) -> None:
        """SIGKILL to the last node's raylet; what runs on it ends by itself."""
        raylet = next(child for child in self.nodes[-1].children() if child.name() == "raylet")
        raylet.kill()


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
                cluster.start(f"--address={cluster.address}", "--num-cpus=1")
            yield cluster
        finally:
            for node in reversed(cluster.nodes):
                node.kill()


def torchrun_agents(folder: Path, port: int) -> list[Program]:
    """Two agents of an elastic torchrun, one rank each."""
    loop = str(Path(__file__).resolve().parent / "recovery_loop.py")
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "recovery"]
    words = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", *rendezvous, loop, str(folder)]
    return [Program([program("torchrun"), *words], folder) for _ in range(2)]


def is_rank(process: psutil.Process) -> bool:
    """Whether this is one of the processes that train."""
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "RayTrainWorker" in words or ("recovery_loop.py" in words and "torchrun" not in words)
