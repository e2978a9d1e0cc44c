"""Puts together what drives the ranks of a run: Ray Train's trainer, who decides about failures, who watches. Ray is
imported where it is used."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster.base import Demand
from ..distributed.attempt import choose_streams
from ..recipes.load import LoadedRecipe
from ..recipes.redact import redact
from ..recipes.schema_cluster import ClusterConfig, RayCluster
from ..recipes.schema_nodes import NodeRange
from .budget import Budget
from .control import Control
from .settle import run_of
from .sizes import choose_nodes

if TYPE_CHECKING:
    from .ray_train_compat import Supervision

SPENT = "they have failed too often without a newer checkpoint (cluster.max_restarts)"


def start_control() -> Any:
    """The line to the ranks, on this machine's node: it must outlive any other."""
    import ray
    from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]

    here = {RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    # "ray.remote" as a function: the actor's class stays a plain one that tests use without Ray.
    return ray.remote(num_cpus=0)(Control).options(label_selector=here).remote()


def build_supervision(loaded: LoadedRecipe, demand: Demand, launch: str, control: Any) -> Supervision:
    """Of one run, whose ranks and watchers talk through `control`. `launch`: see `budget.py`."""
    import ray
    from ray.train import ScalingConfig

    from .live_nodes import LiveNodes
    from .ray_policies import BudgetPolicy, LiveNodesPolicy
    from .ray_train_compat import Supervision
    from .spares import Spares
    from .watch import Watch

    recipe, run = loaded.recipe, run_of(loaded)
    live = LiveNodes(lambda: ray.get(control.noticed.remote()))
    budget = Budget(run, launch, recipe.cluster.max_restarts)
    streams = choose_streams(recipe, demand.ranks)

    def say(text: str, *, waits: bool = False) -> None:
        control.tell.remote({"kind": "message", "level": "warning", "text": text, "waits": waits})

    failures = BudgetPolicy(budget, say, hide=lambda text: redact(text, loaded.secrets))
    scaling = LiveNodesPolicy(
        scaling_config(demand, ScalingConfig),
        demand,
        live,
        choose=partial(choose_nodes, demand=demand, recipe=recipe, streams=streams),
        bad_nodes=budget.bad_nodes,
        leave=control.request_move.remote,
        say_waiting=partial(say, waits=True),
        grow_after_s=wanted.grow_after_s if isinstance(wanted := recipe.cluster.nodes, NodeRange) else float("inf"),
        is_pausing=lambda: failures.is_pausing,
    )
    watch = Watch(live, run, recipe.cluster.hang_timeout_s, lambda: ray.get(control.progress.remote()), say)
    return Supervision(scaling, failures, watch, Spares(demand) if stand_by(recipe.cluster, demand) else None)


def stand_by(config: ClusterConfig, demand: Demand) -> bool:
    """Whether processes may stand by for ranks. GPUs of a cluster that serves others too are Ray's to give, anew each
    time."""
    return config.standby and not (demand.uses_gpus and isinstance(config, RayCluster))


def scaling_config(demand: Demand, make: Any) -> Any:
    """In Ray Train's terms."""
    return make(num_workers=demand.ranks, use_gpu=demand.uses_gpus, resources_per_worker=demand.resources_per_rank)


def build_trainer(
    loaded: LoadedRecipe, demand: Demand, control: Any, supervision: Supervision, storage_folder: Path
) -> Any:
    """What runs the ranks. `storage_folder`: Ray Train's own state is of no use after this process."""
    from ray.train import RunConfig, ScalingConfig

    from .ray_train_compat import LeanTrainer
    from .worker import RendezvousConfig, WorkerConfig, train_worker

    worker = WorkerConfig(
        loaded=loaded,
        control=control,
        command=tuple(sys.argv),
        folder=str(Path.cwd()),
        uses_gpus=demand.uses_gpus,
    )
    return LeanTrainer(
        train_worker,
        train_loop_config={"worker": worker},
        backend_config=RendezvousConfig(),
        scaling_config=scaling_config(demand, ScalingConfig),
        run_config=RunConfig(name=loaded.recipe.name, storage_path=str(storage_folder)),
        supervision=supervision,
    )
