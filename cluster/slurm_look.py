"""The first step of a `slurm` job: what each node is, written to START/node-N.json. `look JOB START`.

As `host_agent.py`, it imports the standard library only, and begins on Pythons that are too old for ftlaunch.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .host_agent import facts, free_port, missing, put

if TYPE_CHECKING:
    from collections.abc import Mapping

UDP_PORT = 9
"""Nothing is sent: connecting is enough to know by which way it would go."""


def main() -> int:
    """Look, and write it down for all."""
    job, start = Path(sys.argv[1]), Path(sys.argv[2])
    spec = json.loads((job / "spec.json").read_text())
    said = look(job, spec, os.environ)
    put(start / f"node-{said['number']}.json", json.dumps(said))
    return 0


def look(job: Path, spec: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """This node, by what Slurm says of it and what it says itself."""
    said = facts({"packages": spec["packages"]})
    launcher = environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    cores = int(environ.get("SLURM_CPUS_ON_NODE", said["cores"]))
    return {
        **said,
        **missing({"paths": list(spec["paths"].values())}),
        "number": int(environ["SLURM_NODEID"]),
        "name": environ["SLURMD_NODENAME"],
        "cores": min(said["cores"], cores),
        "proof": (job / "proof").read_text(),
        "launcher": launcher,
        "address": way_to(launcher) or next(iter(said["addresses"]), "127.0.0.1"),
        "port": free_port({})["port"],
    }


def way_to(address: str) -> str | None:
    """This node's own address on the way to another."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asked:
        asked.connect((address, UDP_PORT))
        own: str = asked.getsockname()[0]
        return own
    return None
