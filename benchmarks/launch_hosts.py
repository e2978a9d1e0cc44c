"""How long until training has begun on three hosts? From the command to the end of the first optimizer step.

The hosts are namespaces of this machine, each with a network, processes and an sshd of its own, as the tests have them.
`ftlaunch recipe.yaml` on a cluster of type `ssh` asks every host what it is, ships its code, starts Ray on all of them
and the driver on the first, and then does what `launch` measures. `torchrun` is started on each host by one `ssh` each,
as one would by hand, and told the network interface that its gloo would not find. The doctor's measurements
(`cluster.doctor`) are a side of their own. Three ranks share this machine's cores: hosts of their own would be quicker.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import ROOT, Table, arguments, interleave, parse, program, write_results
from launch import ROWS, first_step_s
from launch import SIZE as ONE_HOST
from workload import recipe, write_model, write_recipe, write_text

CLAIM = "From the command to the end of the first optimizer step on three hosts: seconds behind bare torchrun."
NAMES = ("alpha", "beta", "gamma")
PORT = 29_400
SIZE = replace(ONE_HOST, batch=6)
"""Two rows for each rank."""


def write_inputs(folder: Path, seed: int, cluster: dict[str, Any]) -> None:
    """Model, text, and recipes of one step."""
    model = write_model(folder / "model", SIZE, seed)
    text = write_text(folder / "text.jsonl", SIZE, ROWS, seed)
    for name, doctor in (("recipe", False), ("measured", True)):
        sections = recipe(folder, model, text, SIZE, train={"max_steps": 1, "micro_batch_size": 1})
        write_recipe(folder / f"{name}.yaml", {**sections, "cluster": {**cluster, "doctor": doctor}})


def agent(folder: Path, hosts: Any, rank: int) -> list[str]:
    """One host's agent of torchrun, through ssh."""
    plain = str(Path(__file__).resolve().parent / "plain_launch.py")
    first = hosts.members[NAMES[0]]
    words = [
        "env", f"GLOO_SOCKET_IFNAME={hosts.switch}p{rank + 1}", "OMP_NUM_THREADS=1",
        program("torchrun"), "--nnodes", str(len(NAMES)), "--node-rank", str(rank), "--nproc-per-node", "1",
        "--master-addr", first.address, "--master-port", str(PORT), plain, "model", "text.jsonl", str(SIZE.batch),
    ]  # fmt: skip
    remote = f"cd {shlex.quote(str(folder))} && {shlex.join(words)}"
    return ["ssh", "-F", str(hosts.ssh_config), NAMES[rank], remote]


def torchrun_s(folder: Path, hosts: Any) -> float:
    """Seconds to the end of the plain script's first step."""
    started = time.time()
    agents = [
        subprocess.Popen(agent(folder, hosts, rank), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(len(NAMES))
    ]
    said = [one.communicate()[0] for one in agents]
    if any(one.returncode for one in agents):
        raise SystemExit("\n".join(said))
    return float((folder / "first_step").read_text()) - started


def sides(folder: Path, hosts: Any, *, quick: bool) -> dict[str, Callable[[], float]]:
    """Who is measured."""
    found: dict[str, Callable[[], float]] = {
        "torchrun, plain script": partial(torchrun_s, folder, hosts),
        "ftlaunch": partial(first_step_s, folder, [program("ftlaunch"), "recipe.yaml"]),
    }
    if not quick:
        measured = [program("ftlaunch"), "measured.yaml"]
        found["ftlaunch, hosts measured first"] = partial(first_step_s, folder, measured)
    return found


def main() -> None:
    sys.path.append(str(ROOT / "tests" / "support"))
    from ssh_hosts import ssh_hosts

    parser = arguments(__doc__ or "")
    options = parse(parser)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ssh_hosts(*NAMES) as hosts:
        folder = hosts.folder / "launch"
        folder.mkdir()
        write_inputs(folder, options.seed, hosts.cluster(env=["OMP_NUM_THREADS"]))
        values = interleave(sides(folder, hosts, quick=options.quick), options.rounds, "3 hosts")
    table = Table("Command to first step, 3 hosts with a rank each", "s", "torchrun, plain script", values)
    write_results("launch_hosts", options, CLAIM, [table], {**asdict(SIZE), "rows": ROWS, "hosts": len(NAMES)})


if __name__ == "__main__":
    main()
