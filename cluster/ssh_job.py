"""The files that make a run start on the hosts of an `ssh` cluster: what each host's keeper is told. Pure.

JOB/keeper.json    what to start (see `host_keeper.py`)      JOB/token        of Ray, new for every run
JOB/driver.json    what the driver is told, on the first      JOB/bin/drive    the program that is the driver
JOB/package/       our code                                   JOB/r            Ray's files; sockets need short paths
"""

from __future__ import annotations

import base64
import fnmatch
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Demand
from .ray_settings import QUIET

PROGRAM = """import sys

from {module} import {function}

sys.exit({function}())
"""

RAY_ENVIRONMENT = {
    **QUIET,
    "RAY_AUTH_MODE": "token",
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
    # Seconds for which a node waits for a head that is gone; one that comes back is another one, to be joined anew.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    # Folders of the driver's are no place to look for modules.
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Node:
    """A host with its place in the job. `folder` is the job's on it, `address` what the others reach it by."""

    host: str
    python: str
    folder: str
    address: str


@dataclass(frozen=True)
class JobPlan:
    """Of all hosts. `nodes` in the order of ranks, the first one with the driver. `port`: Ray's; None: the first host
    has not been asked for a free one yet."""

    job: str
    nodes: tuple[Node, ...]
    port: int | None
    demand: Demand
    entry: str
    folder: str
    environ: Mapping[str, str]

    @property
    def address(self) -> str:
        """Ray's."""
        return f"{self.nodes[0].address}:{self.port}"

    def files(self, index: int, token: str, driver: Mapping[str, Any], code: Mapping[str, bytes]) -> dict[str, bytes]:
        """Those of one host, by their path in the job's folder."""
        files = {f"package/{name}": content for name, content in code.items()}
        files |= {"token": token.encode(), "keeper.json": json.dumps(self._keeper(index)).encode()}
        if index == 0:
            files["bin/drive"] = program(self.entry).encode()
            files["driver.json"] = json.dumps(driver).encode()
        return files

    def _keeper(self, index: int) -> dict[str, Any]:
        node = self.nodes[index]
        drive = [node.python, "-P", f"{node.folder}/bin/drive", f"{node.folder}/driver.json", self.address]
        environ = {**RAY_ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": f"{node.folder}/token", **self.environ}
        return {
            "ray": [node.python, "-P", "-m", "ftlaunch.cluster.host_ray", *self.ray_arguments(index)],
            "ray_address": [self.nodes[0].address, self.port],
            "driver": drive if index == 0 else None,
            "driver_folder": self.folder,
            "env": environ,
        }

    def ray_arguments(self, index: int) -> list[str]:
        """Of `ray`. Ports that two jobs on one host could both want are left to the system."""
        node, demand = self.nodes[index], self.demand
        ranks = demand.ranks // demand.nodes
        role = (
            ["--head", f"--port={'PORT' if self.port is None else self.port}", "--include-dashboard=false"]
            if index == 0
            else [f"--address={self.address}"]
        )
        return [
            "start",
            *role,
            "--block",
            f"--node-ip-address={node.address}",
            # So that exactly the ranks of a node fit on it.
            f"--num-cpus={ranks * demand.cpus_per_rank}",
            f"--num-gpus={ranks if demand.uses_gpus else 0}",
            f"--temp-dir={node.folder}/r",
            f"--labels=ftlaunch-node={index}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            "--dashboard-host=127.0.0.1",
            "--disable-usage-stats",
        ]

    def text(self) -> str:
        """For people: what is started where."""
        lines = [
            f"{node.host}: {shlex.join(['ray', *self.ray_arguments(index)])}" for index, node in enumerate(self.nodes)
        ]
        return "\n".join([*lines, f"{self.nodes[0].host}: the driver"])


def program(entry: str) -> str:
    """What runs `module:function`. A file of its own in a folder with nothing else: Ray puts the folder of a driver's
    program on its workers' path."""
    module, _, function = entry.partition(":")
    return PROGRAM.format(module=module, function=function)


def travelling(patterns: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that some names and patterns mean."""
    return {name: value for name, value in environ.items() if any(fnmatch.fnmatchcase(name, each) for each in patterns)}


def unset(patterns: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Names among the patterns of variables that are not set here."""
    return [each for each in patterns if "*" not in each and each not in environ]


def read_package(folder: Path) -> dict[str, bytes]:
    """The files of the folder that a `CodeFolder` makes, by their path from its parent."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in files}


def packed(files: Mapping[str, bytes]) -> dict[str, str]:
    """Files as `start` takes them."""
    return {name: base64.b64encode(content).decode() for name, content in files.items()}
