"""Drives one run from this process: brings the cluster up, starts the ranks through Ray Train, shows progress, passes
Ctrl-C on, and says how it ended."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
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
from ..recipes.schema_nodes import NodeRange, least_nodes
from .control import Ending, Event
from .doctor.preflight import on_fit_nodes
from .failure import Failure
from .hardware import Machine
from .imports import import_all
from .package import joined
from .plan_world import WorldPlan, plan_world, world_of
from .supervision import SPENT, build_supervision, build_trainer, start_control
from .unknown import Unknown
from .view import View

POLL_S = 0.2
ENDING_S = 5.0
"""For the other ranks to end by themselves after one has told of a mistake."""

TRAINER_IMPORTS = ("ray.train", "ftlaunch.launcher.ray_train_compat", "ftlaunch.launcher.worker")

ROOM_POLLS = 50
"""Without a word from the ranks, after which the user is told what the cluster is short of: 10 s."""

CONTROL_S = 30.0
"""For this machine's own Ray to answer; without it nothing can be driven."""


class ClusterLost(InfrastructureError):
    """Ray itself has ended: what drives the run has to begin anew."""


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
    least = least_nodes(config.nodes) if isinstance(config.nodes, NodeRange) else None
    return _demand(world, offer.cpus_per_node // world.ranks_per_node, least)


def _demand(world: WorldPlan, cpus_per_rank: int, least_nodes: int | None = None) -> Demand:
    """Ray hands a rank as many threads as it is given cores."""
    return Demand(
        nodes=world.nodes,
        ranks=world.ranks,
        uses_gpus=world.device == "cuda",
        cpus_per_rank=max(1, cpus_per_rank),
        least_nodes=least_nodes,
    )


@dataclass(frozen=True)
class Nodes:
    """What a run asks for, and the cluster that has it. `launch`: the command that the run's failures are counted for
    (see `budget.py`)."""

    demand: Demand
    cluster: Cluster
    launch: str


def find_nodes(config: ClusterConfig, machine: Machine, launch: str) -> Nodes:
    """Those that a recipe asks for, to be joined from here. Raises as `find_demand` does."""
    demand = find_demand(config, machine)
    return Nodes(demand, build_cluster(config, demand), launch)


def supervise(loaded: LoadedRecipe, nodes: Nodes, view: View) -> Ending:
    """Train; returns how it ended. Raises UserError and InfrastructureError for what never started, and ClusterLost."""
    if problems := nodes.cluster.problems():
        raise UserError("\n".join(problems))
    view.update({"kind": "phase", "phase": "starting Ray"})
    # While Ray's processes come up, this one has nothing to do but wait.
    threading.Thread(target=import_all, args=(TRAINER_IMPORTS,), daemon=True).start()

    def warn(text: str) -> None:
        view.update({"kind": "message", "level": "warning", "text": text})

    room = _room(loaded.recipe.cluster, nodes.demand, view)
    with joined(nodes.cluster), room, on_fit_nodes(loaded, nodes.demand, warn):
        return _Training(loaded, nodes, view).run()


def _room(config: ClusterConfig, demand: Demand, view: View) -> contextlib.AbstractContextManager[None]:
    """A running cluster that lacks nodes is asked for them."""
    if not isinstance(config, RayCluster):
        return contextlib.nullcontext()
    from ..cluster.autoscaling import room

    return room(config, demand, lambda text: view.update({"kind": "message", "level": "info", "text": text}))


@dataclass
class _Training:
    loaded: LoadedRecipe
    nodes: Nodes
    view: View
    error: BaseException | None = None
    _interrupts: int = 0
    _begun: bool = False
    """Whether ranks have begun to connect since nodes were last waited for."""
    _control: Any = field(default=None)
    _trainer: Any = field(default=None)
    _verdict: Failure | None = None
    """With what Ray Train was told to give up."""

    def run(self) -> Ending:
        self._control = start_control()
        fit = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        try:
            with _interrupts_to(self._on_interrupt):
                fit.start()
                ending = self._watch(fit)
        except KeyboardInterrupt:
            if self._trainer is not None:
                self._trainer.give_up()
            fit.join(ENDING_S)
            raise
        return ending or self._what_failed()

    def _what_failed(self) -> Ending:
        """What the ranks could not say themselves. Raises ClusterLost where it was Ray that failed."""
        if self._verdict is None:
            raise ClusterLost(f"Ray failed: {self.error}")
        if self._verdict.response == "stop":
            traceback = f"\n{self.error}" if self._verdict.kind == "bug" else ""
            return Ending("failed", f"{self._verdict}{traceback}", self._verdict.exit_code)
        return Ending("failed", f"{self._verdict}; the ranks are not started again: {SPENT}", 2)

    def _watch(self, fit: threading.Thread) -> Ending | None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        for polls in itertools.count():
            fit.join(POLL_S)
            if polls == ROOM_POLLS and not self._begun:
                self._say_what_is_missing()
            over = not fit.is_alive()
            try:
                events, ending = ray.get(self._control.take.remote(), timeout=CONTROL_S)
            except (RayError, GetTimeoutError) as error:
                raise ClusterLost(f"Ray on this machine does not answer any more: {error}") from error
            for event in events:
                self.view.update(event)
                self._note(event)
            if ending is not None and ending.outcome == "failed":
                # Ranks that only saw a connection break would be started again, to fail again.
                fit.join(ENDING_S)
                over = True
            if over:
                ended: Ending | None = ending
                return ended
        raise AssertionError("counting never ends")

    def _note(self, event: Event) -> None:
        """Raises KeyboardInterrupt where those who were to save are not there any more, nor will be soon."""
        if event.get("waits"):
            self._begun = False
            if self._interrupts:
                raise KeyboardInterrupt
        elif event.get("phase") == "connecting":
            self._begun = True

    def _say_what_is_missing(self) -> None:
        """Ranks that find no room are tried again without a word. Those that have it and are slow to start are not
        meant: what they hold is not free either."""
        import ray
        from ray.util import placement_group_table

        if all(group["state"] != "PENDING" for group in placement_group_table().values()):
            return
        free, demand = ray.available_resources(), self.nodes.demand
        short = [
            f"{each * demand.ranks:g} {resource} (free: {free.get(resource, 0):g})"
            for resource, each in demand.resources_per_rank.items()
            if free.get(resource, 0) < each * demand.ranks
        ]
        if short:
            text = f"waiting for room: {demand.ranks} ranks need {' and '.join(short)}; Ctrl-C gives up"
            self.view.update({"kind": "message", "level": "warning", "text": text})

    def _on_interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1 or not self._begun:  # while no ranks are there, nothing is lost
            raise KeyboardInterrupt
        self.view.update({"kind": "message", "level": "warning", "text": "stopping after this step; again: at once"})
        self._control.request_stop.remote()

    def _fit(self) -> None:
        """In a thread, because Ray Train's own Ctrl-C handling, which aborts, installs itself in the main one."""
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        try:
            supervision = build_supervision(self.loaded, self.nodes.demand, self.nodes.launch, self._control)
            try:
                with tempfile.TemporaryDirectory(prefix="ftlaunch-ray-") as storage:
                    demand = self.nodes.demand
                    self._trainer = build_trainer(self.loaded, demand, self._control, supervision, Path(storage))
                    self._trainer.fit()
            finally:
                self._verdict = supervision.failures.verdict
        except Exception as error:  # handed to the main thread
            self.error = error


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
