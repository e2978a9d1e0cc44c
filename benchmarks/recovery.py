"""How long until a run goes on after something died? From SIGKILL to the next step that had not been taken before.

A step that was taken already and is taken again does not count. All sides save every 10 steps, and are disturbed half a
minute behind their beginning and 2 to 4 steps behind a save; models are so small that loading them is no part of it.
`ftlaunch` and Ray Train run on a Ray cluster of two nodes with one rank each, and so do two agents of torchrun.

- worker: one rank is killed; all sides may keep both nodes.
- node: a node is lost with its rank (SIGKILL to all that runs on it); all sides are elastic, with
  1 to 2 nodes.
- hang: a rank is stopped (SIGSTOP). Only we notice: Ray Train's health check waits for 10 minutes, gloo for 30.
  `cluster.hang_timeout_s` is 10 s and part of the time.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from harness import Table, arguments, interleave, parse, program, write_results
from recovery_nodes import (
    RAY,
    Program,
    RayNodes,
    free_port,
    holds,
    last_step,
    most_steps,
    ranks_of,
    ray_nodes,
    torchrun_agent,
)  # fmt: skip
from workload import Size, recipe, write_model, write_recipe, write_text

CLAIM = (
    "From SIGKILL to the next new step: at most 5 s for a rank and 8 s for a node, no row lost or repeated; less than "
    "Ray Train with its defaults and less than `torchrun --max-restarts`. A rank that hangs is found and replaced."
)
SIZE = Size(hidden=128, layers=2, vocab=1024, sequence=64, batch=4)
ROWS = 256
SAVE_EVERY = 10
BEHIND = 2
TRAINED_S = 30.0
HANG_S = 10.0
FAULTS = ("worker", "node", "hang")


def write_inputs(folder: Path, seed: int) -> None:
    """Model and text."""
    write_model(folder / "model", SIZE, seed)
    write_text(folder / "text.jsonl", SIZE, ROWS, seed)


def recovery_s(running: Program, log: Path, disturb: Callable[[], None]) -> float:
    """Let it train, disturb it, and wait for a new step; seconds."""
    running.wait_for(lambda: last_step(log) >= SAVE_EVERY, f"step {SAVE_EVERY}")
    time.sleep(TRAINED_S)
    running.wait_for(lambda: last_step(log) % SAVE_EVERY == BEHIND, f"a step {BEHIND} behind a save")
    disturb()
    started = time.monotonic()
    time.sleep(0.5)  # ranks that are not hit yet may finish the step at hand
    taken = most_steps(log)
    running.wait_for(lambda: last_step(log) > taken, f"a step beyond {taken}")
    return time.monotonic() - started


def kill_last_rank(programs: list[Program]) -> None:
    """SIGKILL to the rank that was started last."""
    ranks_of(programs)[-1].kill()


def stop_last_rank(programs: list[Program]) -> None:
    """As a rank that hangs."""
    ranks_of(programs)[-1].send_signal(signal.SIGSTOP)


def disturb(fault: str, cluster: RayNodes) -> Callable[[], None]:
    """What happens to a run on a Ray cluster."""
    return {
        "worker": partial(kill_last_rank, cluster.nodes),
        "node": cluster.lose_last,
        "hang": partial(stop_last_rank, cluster.nodes),
    }[fault]


def ours_s(folder: Path, fault: str) -> float:
    """ftlaunch."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    with ray_nodes(folder, 2) as cluster, ExitStack() as ends:
        nodes = {"min": 1, "max": 2, "grow_after_s": 600} if fault == "node" else 2
        sections = recipe(
            folder,
            folder / "model",
            folder / "text.jsonl",
            SIZE,
            train={"max_steps": 100_000, "micro_batch_size": 1},
            checkpoint={"every_steps": SAVE_EVERY},
            cluster={"type": "ray", "address": cluster.address, "nodes": nodes, "gpus_per_node": 0}
            | {"hang_timeout_s": HANG_S, "doctor": False},
        )
        write_recipe(folder / "recipe.yaml", sections)
        running = Program([program("ftlaunch"), "recipe.yaml"], folder, RAY)
        ends.callback(running.kill)
        return recovery_s(running, folder / "runs/benchmark/metrics.jsonl", disturb(fault, cluster))


def ray_train_s(folder: Path, fault: str) -> float:
    """Ray Train with its defaults."""
    clean(folder)
    with ray_nodes(folder, 2) as cluster, ExitStack() as ends:
        loop = str(Path(__file__).resolve().parent / "recovery_loop.py")
        nodes = "1-2" if fault == "node" else "2"
        running = Program([program("python"), loop, str(folder), cluster.address, nodes], folder, RAY)
        ends.callback(running.kill)
        return recovery_s(running, folder / "steps.jsonl", disturb(fault, cluster))


def torchrun_s(folder: Path, fault: str) -> float:
    """Two agents of torchrun; the one that is lost does not hold the rendezvous."""
    clean(folder)
    port = free_port()
    agents = [torchrun_agent(folder, port) for _ in range(2)]
    try:
        victim = next(agent for agent in agents if not holds(agent, port))
        acts = {"worker": partial(kill_last_rank, [victim]), "node": victim.kill}
        survivor = next(agent for agent in agents if agent is not victim)
        return recovery_s(survivor, folder / "steps.jsonl", acts[fault])
    finally:
        for agent in agents:
            agent.kill()


def clean(folder: Path) -> None:
    """What peers have left."""
    for name in ("steps.jsonl", "checkpoint.pt", "checkpoint.new"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "ray", ignore_errors=True)


def sides(folder: Path, fault: str) -> dict[str, Callable[[], float]]:
    """Who is measured."""
    found = {"ftlaunch": partial(ours_s, folder, fault)}
    if fault != "hang":
        found |= {"Ray Train": partial(ray_train_s, folder, fault), "torchrun": partial(torchrun_s, folder, fault)}
    return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    options = parse(parser)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tables = []
    with tempfile.TemporaryDirectory(prefix="recovery-") as place:
        folder = Path(place)
        write_inputs(folder, options.seed)
        for fault in options.faults:
            values = interleave(sides(folder, fault), options.rounds, fault)
            tables.append(Table(f"SIGKILL to the next new step: {fault}", "s", "ftlaunch", values))
    settings = {**asdict(SIZE), "save_every": SAVE_EVERY, "trained_s": TRAINED_S, "hang_timeout_s": HANG_S}
    write_results("recovery", options, CLAIM, tables, settings)


if __name__ == "__main__":
    main()
