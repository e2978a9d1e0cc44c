"""How much of the time is training, where something dies every minute? One side after the other, 20 minutes each.

Two ranks on two nodes train a small model and save every 10 steps. Every minute a rank is killed (SIGKILL), every
fourth time a node with its rank, which is replaced after 10 s; which is drawn once, and the same for all sides. Sides
are those of `recovery`: elastic, with 1 to 2 nodes.

Goodput of a minute: steps that had not been taken before, of those that the same side takes in a minute in which
nothing happens, measured before the first failure. So steps that are taken again do not count, a smaller world counts
as slow as it is, and how fast a side is when nothing fails does not count.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import Table, arguments, program, run_checked, write_results
from recovery import SAVE_EVERY, SIZE, clean, write_inputs
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
from workload import recipe, write_recipe

CLAIM = "With a failure every minute most of the time is training, and more of it than under `torchrun --max-restarts`."
EVERY_S = 60.0
BACK_S = 10.0
CALM_S = 60.0
"""In which nothing happens, before the first failure."""

NODE_EVERY = 4
RESTARTS = 1000


@dataclass(frozen=True)
class Failure:
    """What is killed, and which of the two ranks."""

    what: str
    which: int


def draw(minutes: int, seed: int) -> list[Failure]:
    """One a minute."""
    rng = random.Random(seed)
    return [Failure("node" if n % NODE_EVERY == NODE_EVERY - 1 else "rank", rng.randrange(2)) for n in range(minutes)]


class Side(ABC):
    """Something that trains on two nodes."""

    running: Program
    log: Path

    @abstractmethod
    def programs(self) -> list[Program]:
        """Under which ranks run, the one that is never lost first."""

    @abstractmethod
    def lose_node(self) -> None: ...

    @abstractmethod
    def replace_node(self) -> None: ...

    def kill_rank(self, which: int) -> None:
        """One of those that train at the moment."""
        found = ranks_of(self.programs())
        if found:  # all of them may just be starting
            found[which % len(found)].kill()


@dataclass
class OnRay(Side):
    """A program on a Ray cluster."""

    cluster: RayNodes
    running: Program
    log: Path

    def programs(self) -> list[Program]:
        return self.cluster.nodes

    def lose_node(self) -> None:
        self.cluster.lose_last()

    def replace_node(self) -> None:
        self.cluster.add()


@dataclass
class Torchrun(Side):
    """Agents of torchrun; the first one holds the rendezvous."""

    folder: Path
    port: int
    agents: list[Program]
    running: Program = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.running, self.log = self.agents[0], self.folder / "steps.jsonl"

    def programs(self) -> list[Program]:
        return self.agents

    def lose_node(self) -> None:
        self.agents.pop().kill()

    def replace_node(self) -> None:
        self.agents.append(torchrun_agent(self.folder, self.port, RESTARTS))


@contextmanager
def ours(folder: Path) -> Iterator[Side]:
    """ftlaunch, with its defaults."""
    with ray_nodes(folder, 2) as cluster, ExitStack() as ends:
        sections = recipe(
            folder,
            folder / "model",
            folder / "text.jsonl",
            SIZE,
            train={"max_steps": 10_000_000, "micro_batch_size": 1},
            checkpoint={"every_steps": SAVE_EVERY},
            cluster={"type": "ray", "address": cluster.address, "nodes": {"min": 1, "max": 2}, "gpus_per_node": 0}
            | {"doctor": False},
        )
        write_recipe(folder / "recipe.yaml", sections)
        running = Program([program("ftlaunch"), "recipe.yaml"], folder, RAY)
        ends.callback(running.kill)
        yield OnRay(cluster, running, folder / "runs/benchmark/metrics.jsonl")


@contextmanager
def ray_train(folder: Path) -> Iterator[Side]:
    """Ray Train with its defaults, and with as many failures allowed as come."""
    clean(folder)
    with ray_nodes(folder, 2) as cluster, ExitStack() as ends:
        loop = str(Path(__file__).resolve().parent / "recovery_loop.py")
        words = [program("python"), loop, str(folder), cluster.address, "1-2", str(RESTARTS)]
        running = Program(words, folder, RAY)
        ends.callback(running.kill)
        yield OnRay(cluster, running, folder / "steps.jsonl")


@contextmanager
def torchrun(folder: Path) -> Iterator[Side]:
    """Two agents."""
    clean(folder)
    port = free_port()
    agents = [torchrun_agent(folder, port, RESTARTS) for _ in range(2)]
    try:
        agents.sort(key=lambda agent: not holds(agent, port))
        side = Torchrun(folder, port, agents)
        yield side
    finally:
        for agent in agents:
            agent.kill()


SIDES = {"ftlaunch": ours, "torchrun": torchrun, "Ray Train": ray_train}


def goodputs(side: Side, failures: Sequence[Failure], title: str) -> list[float]:
    """One a minute."""
    side.running.wait_for(lambda: last_step(side.log) >= 2 * SAVE_EVERY, "the first steps")
    before, began = most_steps(side.log), time.monotonic()
    time.sleep(CALM_S)
    per_s = (most_steps(side.log) - before) / (time.monotonic() - began)
    found = []
    for number, failure in enumerate(failures, 1):
        before, began = most_steps(side.log), time.monotonic()
        if failure.what == "rank":
            side.kill_rank(failure.which)
        else:
            side.lose_node()
            time.sleep(BACK_S)
            side.replace_node()
        time.sleep(max(0.0, began + EVERY_S - time.monotonic()))
        if side.running.process.poll() is not None:
            raise SystemExit(f"{title} has ended:\n{side.running.text[-6000:]}")
        found.append((most_steps(side.log) - before) / (time.monotonic() - began) / per_s)
        said = f"{title}, minute {number}/{len(failures)}: {failure.what} {found[-1]:.3g}"
        print(said, file=sys.stderr, flush=True)
    return found


def ledger(folder: Path) -> str:
    """What the run itself says of where its time went."""
    said = json.loads(run_checked([program("ftlaunch"), "status", "benchmark", "--json"], folder))["goodput"]
    parts = sorted(said["seconds"].items(), key=lambda part: -part[1])
    told = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts if seconds >= 1)
    share = f"goodput {said['goodput']:.1%} of {said['total_s']:.0f} s"
    return f"`ftlaunch status` of ours, start included: {share} ({told})."


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--minutes", type=int, default=20, help="as many failures, for each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    options.rounds = options.minutes = 1 if options.quick else options.minutes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failures = draw(options.minutes, options.seed)
    values, note = {}, ""
    with tempfile.TemporaryDirectory(prefix="goodput-") as place:
        folder = Path(place)
        write_inputs(folder, options.seed)
        for name in options.sides:
            with SIDES[name](folder) as side:
                values[name] = goodputs(side, failures, name)
            note = note or (ledger(folder) if name == "ftlaunch" else "")
    base = "torchrun" if "torchrun" in values else options.sides[0]
    told = "; ".join(f"{name} {statistics.mean(each):.1%}" for name, each in values.items())
    title = f"Goodput with a failure a minute, {options.minutes} minutes"
    table = Table(title, "share", base, values, f"Of the whole time: {told}. {note}")
    settings = {**asdict(SIZE), "save_every": SAVE_EVERY, "failures": [asdict(one) for one in failures]}
    write_results("goodput", options, CLAIM, [table], settings)


if __name__ == "__main__":
    main()
