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
import logging
import threading
from typing import Any

import ray
from ray._private.log import PlainRayHandler
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from .imports import import_all

RANK_IMPORTS = (
    "ftlaunch.distributed.entry",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
    "transformers.conversion_mapping",
)
"""What every rank imports sooner or later."""

warm_up = threading.Thread(target=import_all, args=(RANK_IMPORTS,), daemon=True)
"""In a rank's process; joined before its program, because transformers does not bear being imported by two threads."""

NODE_LABEL = "ftlaunch-node"
"""Label of a Ray node: its number in the order of the cluster's nodes, where they have one."""

UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]
    """`DataParallelTrainer` with its controller in this process. `fit` must not be called in the main thread."""

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, UNUSED)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        policy = FixedPolicy(self.scaling_config)
        controller = LeanController(**{**settings, "scaling_policy": policy})
        _hush_console()
        asyncio.run(controller.run())
        return controller.get_result()


def _hush_console() -> None:
    """The controller logs to Ray's session folder; the terminal is the run's view's."""
    logger = logging.getLogger("ray.train")
    for handler in [*logger.handlers]:
        if isinstance(handler, PlainRayHandler):
            logger.removeHandler(handler)


class FixedPolicy(FixedScalingPolicy):  # type: ignore[misc]
    """A fixed number of ranks, in nodes that are there."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """No request to an autoscaler."""

    def _maybe_send_resource_request(self) -> None:
        pass


class RayTrainWorkerWarmingUp(RayTrainWorker):  # type: ignore[misc]
    """Begins with the slow imports of a rank while Ray Train is still setting up."""

    def __init__(self) -> None:
        warm_up.start()
        super().__init__()


class LeanWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Workers that any process Ray has at hand can become."""

    _worker_cls = RayTrainWorkerWarmingUp

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        # The variables that would be added are the controller's. With them, no process that Ray has started
        # beforehand fits, and new ones first wait for Ray's agent of runtime environments.
        return dict(custom_runtime_env)

    def _create_workers(self, *arguments: Any, **settings: Any) -> list[Any]:
        workers: list[Any] = super()._create_workers(*arguments, **settings)
        places = {node["NodeID"]: node["Labels"].get(NODE_LABEL) for node in ray.nodes()}
        if None in places.values():
            return workers
        # Ray Train ranks nodes as they come; where they have an order, rank 0 is on the first one, with the driver.
        ordered = sorted(workers, key=lambda worker: int(places[worker.metadata.node_id]))
        return list(WorkerGroup._assign_worker_ranks(ordered))

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


class LeanController(TrainController):  # type: ignore[misc]
    """A controller of such workers."""

    worker_group_cls = LeanWorkerGroup


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
