"""The touches of Ray Train's inside (as of 2.60): a trainer that starts one process for each rank, and no other.

By default a run also starts actors for its controller, for requests to the autoscaler, for a barrier that
`ray.train.report` needs, for what is left of a dead controller and for Ray Data. Each is a Python process that imports
ray.train with pandas and ray.data, one after the other: seconds of processor time that the first step has to wait for.

What they do is not missed. The controller lives in the launcher instead; Ray ends actors and placement groups of a
launcher that dies, as it does those of a dead controller. Nothing of ours asks an autoscaler for nodes, reports
through Ray Train, or uses Ray Data.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray._private.log import PlainRayHandler
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus, state, worker_group
from ray.train.v2._internal.execution.worker_group.worker import Worker, WorkerStatus
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import placement_group_table

from .failure import Preempted, Resized
from .rank_process import RayTrainWorkerWarmingUp
from .ray_policies import BudgetPolicy, LiveNodesPolicy, Place
from .spares import Spare, Spares, wait_for_end
from .watch import Rank, Watch

NODE_LABEL = "ftlaunch-node"
"""Label of a Ray node: its number in the order of the cluster's nodes, where they have one."""

UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


CAUSE_S = 2.0
"""For the rank of which others only saw the connection break to be found out about."""

LEAVING_S = 20.0
"""For all ranks to leave once the first has, where they have saved and are to be started again."""

POLL_S = 0.1


@dataclass(frozen=True)
class Supervision:
    """Who decides, and who looks after the ranks."""

    scaling: LiveNodesPolicy
    failures: BudgetPolicy
    watch: Watch
    spares: Spares | None = None
    """None: no process stands by."""


class GivenUp(Exception):
    """What `fit` raises after `give_up`."""


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]
    """`DataParallelTrainer` with its controller in this process. `fit` must not be called in the main thread."""

    def __init__(self, *arguments: Any, supervision: Supervision, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._supervision = supervision
        self._given_up = threading.Event()
        self._cancel: Callable[[], object] = lambda: None

    def give_up(self) -> None:
        """Have `fit` raise GivenUp soon, whatever the ranks do; from any thread. Ray must not be shut down below a
        controller that is at work."""
        self._given_up.set()
        with contextlib.suppress(RuntimeError):  # its loop has just been closed
            self._cancel()

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, UNUSED)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        controller = LeanController(self._supervision, settings)
        _hush_console()
        try:
            asyncio.run(self._run(controller))
        except asyncio.CancelledError:
            raise GivenUp from None
        return controller.get_result()

    async def _run(self, controller: LeanController) -> None:
        task = asyncio.ensure_future(controller.run())
        self._cancel = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        if self._given_up.is_set():
            task.cancel()
        try:
            await task
        finally:
            self._cancel = lambda: None  # the loop will be closed


def _hush_console() -> None:
    """The controller logs to Ray's session folder; the terminal is the run's view's."""
    logger = logging.getLogger("ray.train")
    for handler in [*logger.handlers]:
        if isinstance(handler, PlainRayHandler):
            logger.removeHandler(handler)


class LeanWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Workers that any process Ray has at hand can become."""

    _worker_cls = RayTrainWorkerWarmingUp
    spares: Spares | None = None

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        # The variables that would be added are the controller's. With them, no process that Ray has started
        # beforehand fits, and new ones first wait for Ray's agent of runtime environments.
        return dict(custom_runtime_env)

    def _create_workers(self, num_workers: int, placement_group: Any, resources: Any, **settings: Any) -> list[Any]:
        workers: list[Any]
        if self.spares is None:
            workers = super()._create_workers(num_workers, placement_group, resources, **settings)
        else:
            workers = self._with_spares(self.spares, num_workers, placement_group, resources)
        places = {node["NodeID"]: node["Labels"].get(NODE_LABEL) for node in ray.nodes()}
        if None in places.values():
            return workers
        # Ray Train ranks nodes as they come; where they have an order, rank 0 is on the first one, with the driver.
        ordered = sorted(workers, key=lambda worker: int(places[worker.metadata.node_id]))
        return list(WorkerGroup._assign_worker_ranks(ordered))

    def _with_spares(self, spares: Spares, number: int, group: Any, resources: Any) -> list[Any]:
        """Processes that stand by on the nodes that Ray has chosen for the ranks, and new ones for the others."""
        nodes = placement_group_table(group)["bundles_to_node_id"]
        taken = spares.take([nodes[index] for index in range(number)])
        missing = [index for index, spare in enumerate(taken) if spare is None]
        ready = [_worker(spare, resources, index) for index, spare in enumerate(taken) if spare is not None]
        try:
            made = super()._create_workers(len(missing), group, resources, placement_group_bundle_indices=missing)
            workers = sorted([*made, *ready], key=lambda worker: int(worker.placement_group_bundle_index))
            ray.get([one.actor.execute.remote(wait_for_end, spares.earlier(one.metadata.node_id)) for one in workers])
        except Exception:
            _end_at_once(ready)  # the others end with their placement group
            raise
        return list(WorkerGroup._assign_worker_ranks(workers))

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, arguments: dict[str, Any]) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=None,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[index] for name, values in arguments.items()},
                )
                for index, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


def _worker(spare: Spare, resources: Any, index: int) -> Worker:
    return Worker(spare.actor, spare.metadata, resources, placement_group_bundle_index=index)


@dataclass(frozen=True)
class GroupsWithSpares:
    """Stands for the class of the groups, which Ray Train only asks to `create` one."""

    spares: Spares | None

    def create(self, *arguments: Any, **settings: Any) -> LeanWorkerGroup:
        """As `WorkerGroup.create`."""
        group = LeanWorkerGroup(*arguments, **settings)
        group.spares = self.spares
        group._start()
        return group


class LeanController(TrainController):  # type: ignore[misc]
    """A controller of such workers. `settings` are those of Ray Train's own."""

    def __init__(self, supervision: Supervision, settings: Mapping[str, Any]) -> None:
        self._watch, self._spares = supervision.watch, supervision.spares
        self.worker_group_cls = GroupsWithSpares(supervision.spares)
        policies = {"scaling_policy": supervision.scaling, "failure_policy": supervision.failures}
        super().__init__(**{**settings, **policies})

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> None:
        super()._start_worker_group(num_workers, resources_per_worker)
        self._watch.begin()
        names = self._watch.nodes.names
        keys = {worker.distributed_context.world_rank: worker.metadata.node_id for worker in self._workers}
        self._failure_policy.places = {rank: Place(key, names[key]) for rank, key in keys.items()}
        if self._spares is not None:
            self._spares.begin(self._workers)

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        status = await super()._poll_workers()
        if status.errors:
            return self._settled(status)
        if self._spares is not None:
            self._spares.look()
        found = {} if status.finished else self._watch.look(self._ranks())
        return _with_errors(status, found) if found else status

    @property
    def _workers(self) -> list[Any]:
        return list(self._worker_group.get_workers())

    def _ranks(self) -> dict[int, Rank]:
        asked = self._worker_group._world_rank_to_ongoing_poll
        now = time.monotonic()
        return {
            rank: Rank(
                node=worker.metadata.node_id,
                pid=worker.metadata.pid,
                unanswered_s=now - asked[rank].start_time if rank in asked else 0.0,
                actor=worker.actor,
            )
            for rank, worker in enumerate(self._workers)
        }

    def _settled(self, status: WorkerGroupPollStatus) -> WorkerGroupPollStatus:
        """Wait for the cause, where ranks only tell that another one is gone; and for the others, where they leave."""
        begun = time.monotonic()
        while True:
            errors = status.errors
            leaving = all(isinstance(error, Resized | Preempted) for error in errors.values()) and not status.finished
            echo = not leaving and self._failure_policy.judge(errors).is_echo
            patience_s = CAUSE_S if echo else LEAVING_S if leaving else 0.0
            if time.monotonic() - begun >= patience_s:
                return status
            if echo and (gone := self._watch.ended(self._ranks())):
                return _with_errors(status, gone)
            time.sleep(POLL_S)
            status = self._worker_group.poll_status(timeout=POLL_S)


def _with_errors(status: WorkerGroupPollStatus, errors: Mapping[int, Exception]) -> WorkerGroupPollStatus:
    failed = {rank: WorkerStatus(running=True, error=error) for rank, error in errors.items()}
    return replace(status, worker_statuses={**status.worker_statuses, **failed})


def _end_at_once(workers: list[Any], patience_s: float = 0.0) -> None:
    """Ray Train first asks each to run its callbacks, of which ours have none, and waits for those that cannot."""
    for worker in workers:
        ray.kill(worker.actor)


class NoBarrier:
    """In place of the actor for `ray.train.report`."""

    @classmethod
    def options(cls, **_settings: Any) -> type[NoBarrier]:
        return cls

    @classmethod
    def remote(cls, **_settings: Any) -> NoBarrier:
        return cls()


worker_group.SynchronizationActor = NoBarrier
state._shutdown_sync_actor = lambda _barrier: None
state._shutdown_workers = _end_at_once
