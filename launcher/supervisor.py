"""Drives one run from this process: brings the cluster up, starts the ranks through Ray Train, shows progress, passes
Ctrl-C on, and says how it ended."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ..cluster.base import Cluster, Demand
from ..cluster.table import build_cluster
from ..recipes.errors import InfrastructureError, UserError
from ..recipes.load import LoadedRecipe
from ..recipes.schema_cluster import ClusterConfig, RayCluster
from .control import Control, Ending
from .doctor.preflight import on_fit_nodes
from .hardware import Machine
from .imports import import_all
from .package import write_package
from .plan_world import WorldPlan, plan_world, world_of
from .unknown import Unknown
from .view import View

POLL_S = 0.2
ENDING_S = 5.0
"""For the other ranks to end by themselves after one has told of a mistake."""

TRAINER_IMPORTS = ("ray.train", "ftlaunch.launcher.ray_train_compat", "ftlaunch.launcher.worker")

ROOM_POLLS = 50
"""Without a word from the ranks, after which the user is told what the cluster is short of: 10 s."""

MAX_STARTS = 15
"""Tries to place the ranks, of a minute each while the cluster has no room for them; Ray's own way is to try for
ever."""

MAX_RESTARTS = 3
"""Times the ranks are started again after a failure of a machine; a user's mistake is never tried twice."""


def find_demand(config: ClusterConfig, machine: Machine) -> Demand:
    """What a run asks of its cluster; a running Ray cluster is asked what its nodes have. Raises
    UserError and InfrastructureError."""
    if not isinstance(config, RayCluster):
        world = plan_world(config, machine)
        assert not isinstance(world, Unknown), "only a running cluster has to be asked"
        return _demand(world, machine.cores // world.ranks)
    from ..cluster.existing import ask

    offer = ask(config)
    gpus = offer.gpus_per_node if config.gpus_per_node is None else config.gpus_per_node
    world = world_of(config, gpus)
    return _demand(world, offer.cpus_per_node // world.ranks_per_node)


def _demand(world: WorldPlan, cpus_per_rank: int) -> Demand:
    """Ray hands a rank as many threads as it is given cores."""
    return Demand(
        nodes=world.nodes,
        ranks=world.ranks,
        uses_gpus=world.device == "cuda",
        cpus_per_rank=max(1, cpus_per_rank),
    )


@dataclass(frozen=True)
class Nodes:
    """What a run asks for, and the cluster that has it."""

    demand: Demand
    cluster: Cluster


def find_nodes(config: ClusterConfig, machine: Machine) -> Nodes:
    """Those that a recipe asks for, to be joined from here. Raises as `find_demand` does."""
    demand = find_demand(config, machine)
    return Nodes(demand, build_cluster(config, demand))


def supervise(loaded: LoadedRecipe, nodes: Nodes, view: View) -> Ending:
    """Train; returns how it ended. Raises UserError and InfrastructureError for what never started."""
    if problems := nodes.cluster.problems():
        raise UserError("\n".join(problems))
    view.update({"kind": "phase", "phase": "starting Ray"})
    # While Ray's processes come up, this one has nothing to do but wait.
    threading.Thread(target=import_all, args=(TRAINER_IMPORTS,), daemon=True).start()

    def warn(text: str) -> None:
        view.update({"kind": "message", "level": "warning", "text": text})

    with _up(nodes.cluster), _room(loaded.recipe.cluster, nodes.demand, view), on_fit_nodes(loaded, nodes.demand, warn):
        return _Training(loaded, nodes.demand, view).run()


def _room(config: ClusterConfig, demand: Demand, view: View) -> contextlib.AbstractContextManager[None]:
    """A running cluster that lacks nodes is asked for them."""
    if not isinstance(config, RayCluster):
        return contextlib.nullcontext()
    from ..cluster.autoscaling import room

    return room(config, demand, lambda text: view.update({"kind": "message", "level": "info", "text": text}))


@contextlib.contextmanager
def _up(cluster: Cluster) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="ftlaunch-code-") as folder:
        try:
            cluster.up(lambda: write_package(Path(folder)))
            yield
        finally:
            cluster.down()


@dataclass
class _Training:
    loaded: LoadedRecipe
    demand: Demand
    view: View
    error: BaseException | None = None
    _interrupts: int = 0
    _begun: bool = False
    """Whether a rank has said anything."""
    _control: Any = field(default=None)

    def run(self) -> Ending:
        import ray

        # "ray.remote" as a function: the actor's class stays a plain one that tests use without Ray.
        self._control = ray.remote(num_cpus=0)(Control).remote()
        fit = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        with _interrupts_to(self._on_interrupt):
            fit.start()
            ending = self._watch(fit)
        if ending is None:
            raise InfrastructureError(f"the ranks failed and could not be started again: {self.error}")
        return ending

    def _watch(self, fit: threading.Thread) -> Ending | None:
        import ray

        for polls in itertools.count():
            fit.join(POLL_S)
            if polls == ROOM_POLLS and not self._begun:
                self._say_what_is_missing()
            over = not fit.is_alive()
            events, ending = ray.get(self._control.take.remote())
            self._begun = self._begun or bool(events)
            for event in events:
                self.view.update(event)
            if ending is not None and ending.outcome == "failed":
                # Ranks that only saw a connection break would be started again, to fail again.
                fit.join(ENDING_S)
                over = True
            if over:
                ended: Ending | None = ending
                return ended
        raise AssertionError("counting never ends")

    def _say_what_is_missing(self) -> None:
        """Ranks that find no room are tried again without a word. Those that have it and are slow to start are not
        meant: what they hold is not free either."""
        import ray
        from ray.util import placement_group_table

        if all(group["state"] != "PENDING" for group in placement_group_table().values()):
            return
        free = ray.available_resources()
        short = [
            f"{each * self.demand.ranks:g} {resource} (free: {free.get(resource, 0):g})"
            for resource, each in self.demand.resources_per_rank.items()
            if free.get(resource, 0) < each * self.demand.ranks
        ]
        if short:
            text = f"waiting for room: {self.demand.ranks} ranks need {' and '.join(short)}; Ctrl-C gives up"
            self.view.update({"kind": "message", "level": "warning", "text": text})

    def _on_interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1 or not self._begun:  # before the ranks are there, nothing is lost
            raise KeyboardInterrupt
        self.view.update({"kind": "message", "level": "warning", "text": "stopping after this step; again: at once"})
        self._control.request_stop.remote()

    def _fit(self) -> None:
        """In a thread, because Ray Train's own Ctrl-C handling, which aborts, installs itself in the main one."""
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        try:
            with tempfile.TemporaryDirectory(prefix="ftlaunch-ray-") as storage:
                self._trainer(Path(storage)).fit()
        except Exception as error:  # handed to the main thread
            self.error = error

    def _trainer(self, storage: Path) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from .ray_train_compat import LeanTrainer
        from .worker import RendezvousConfig, WorkerConfig, train_worker

        worker = WorkerConfig(
            loaded=self.loaded,
            control=self._control,
            command=tuple(sys.argv),
            folder=str(Path.cwd()),
            uses_gpus=self.demand.uses_gpus,
        )
        return LeanTrainer(
            train_worker,
            train_loop_config={"worker": worker},
            backend_config=RendezvousConfig(),
            scaling_config=ScalingConfig(
                num_workers=self.demand.ranks,
                use_gpu=self.demand.uses_gpus,
                resources_per_worker=self.demand.resources_per_rank,
            ),
            run_config=RunConfig(
                name=self.loaded.recipe.name,
                # Ray Train's own state is of no use after this process; ours is in the run directory.
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=MAX_RESTARTS, controller_failure_limit=MAX_STARTS),
            ),
        )


@contextlib.contextmanager
def _interrupts_to(handle: Any) -> Iterator[None]:
    """Ctrl-C, and SIGTERM, which is how schedulers and systemd ask (Ray's own handler would end at once)."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        handle()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
