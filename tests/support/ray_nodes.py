"""A Ray cluster of several raylets on this machine that somebody else has started: its head offers nothing, and nodes
come and go."""

from __future__ import annotations

import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from processes import BIN, Command

ADDRESS = re.compile(r"--address='([^']+)'")
STARTED = "Ray runtime started"
PORTS = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]


@dataclass
class RayNodes:
    """Of one cluster. `variables` are those of its users."""

    folder: Path
    variables: Mapping[str, str]
    address: str = ""
    nodes: dict[str, Command] = field(default_factory=dict)

    def start(self, name: str, *arguments: str) -> Command:
        """One `ray start`, until it is up."""
        command = Command(
            [str(BIN / "ray"), "start", *arguments, "--block", f"--labels=test-node={name}", *PORTS],
            self.folder,
            self.variables,
        )
        assert command.wait_until(lambda: STARTED in command.text), command.text
        self.nodes[name] = command
        return command

    def add(self, *names: str) -> None:
        """Nodes for a rank each."""
        for name in names:
            self.start(name, f"--address={self.address}", "--num-cpus=1")

    def lose(self, name: str) -> None:
        """SIGKILL to a node's raylet: all else of it ends by itself."""
        command = self.nodes.pop(name)
        raylet(command).kill()
        command.process.wait()

    def key(self, name: str) -> str:
        """Ray's id of a node."""
        words = raylet(self.nodes[name]).cmdline()
        return next(word.partition("=")[2] for word in words if word.startswith(("--node_id=", "--node-id=")))

    def drain(self, name: str) -> None:
        """A notice that a node is about to be taken away, as a cloud's autoscaler passes it on."""
        command = [
            "drain-node", f"--address={self.address}", f"--node-id={self.key(name)}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=120",
        ]  # fmt: skip
        drained = Command([str(BIN / "ray"), *command], self.folder, self.variables)
        assert drained.wait() == 0, drained.text


def raylet(command: Command) -> psutil.Process:
    """The one that a `ray start` runs."""
    children = psutil.Process(command.process.pid).children(recursive=True)
    return next(child for child in children if child.name() == "raylet")


@contextmanager
def ray_nodes(folder: Path, *names: str, environment: Mapping[str, str] | None = None) -> Iterator[RayNodes]:
    """A cluster of these nodes."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="r") as short:
        cluster = RayNodes(folder, {**token, **(environment or {})})
        try:
            settings = ["--num-cpus=0", "--port=0", "--include-dashboard=false", f"--temp-dir={short}"]
            head = cluster.start("head", "--head", *settings)
            # Ray prints the address some lines after it said that it is up.
            assert head.wait_until(lambda: ADDRESS.search(head.text) is not None), head.text
            found = ADDRESS.search(head.text)
            assert found is not None
            cluster.address = found[1]
            cluster.add(*names)
            yield cluster
        finally:
            for command in reversed(list(cluster.nodes.values())):
                command.kill()
