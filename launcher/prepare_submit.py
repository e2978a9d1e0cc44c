"""`ftlaunch prepare` on a cluster whose nodes are elsewhere: submitted as a run is, and followed to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from ..cluster.base import Demand, Driver, SubmittedCluster
from ..distributed import storage
from ..recipes.errors import InfrastructureError, Interrupted
from ..recipes.load import LoadedRecipe
from ..recipes.schema_cluster import ClusterConfig, SlurmCluster
from ..recipes.schema_kubernetes import KubernetesCluster
from .handover import pack
from .package import write_package
from .say import say
from .submit import checked, clean_up, need_of, show

ENTRY = "ftlaunch.launcher.prepare_drive:main"


def submit_preparation(
    loaded: LoadedRecipe, config: ClusterConfig, to: str, environ: Mapping[str, str], console: Console
) -> int:
    """Make the shards there; the exit code. It ends with this command, but for one that is killed: no run directory
    would say where it is. Raises UserError and InfrastructureError."""
    recipe = loaded.recipe
    need = replace(
        need_of(recipe, environ),
        shared=to if storage.is_local(to) else None,
        shared_setting="--to",
        name=f"{recipe.name}-prepare",
        tell=lambda line: say(console, line),
    )
    say(console, f"looking at the {config.type} cluster …")
    cluster = checked(cores_only(config), need)
    try:
        with TemporaryDirectory(prefix="ftlaunch-code-") as folder:
            job = _job_of(loaded, to, config.max_restarts)
            record = cluster.up(Driver(ENTRY, job), lambda: write_package(Path(folder)))
        return _follow(cluster, record["job"], console)
    finally:
        cluster.down()


def cores_only(config: ClusterConfig) -> ClusterConfig:
    """The same nodes without their GPUs, which make no tokens, and with the cores that came with these."""
    changes: dict[str, Any] = {"gpus_per_node": 0}
    if isinstance(config, KubernetesCluster):
        from ..cluster.kubernetes_job import cores_of

        changes["cpus_per_node"] = cores_of(config)
    if isinstance(config, SlurmCluster) and config.gres is not None:
        others = [one for one in config.gres.split(",") if one.strip().partition(":")[0] != "gpu"]
        changes["gres"] = ",".join(others) or None
    return config.model_copy(update=changes)


def _job_of(loaded: LoadedRecipe, to: str, max_restarts: int) -> Any:
    def job(demand: Demand) -> dict[str, Any]:
        return {
            "loaded": pack(loaded),
            "to": to,
            "max_restarts": max_restarts,
            "demand": asdict(demand),
            "columns": Console().width,
        }

    return job


def _follow(cluster: SubmittedCluster, job: str, console: Console) -> int:
    try:
        say(console, f"submitted as job {job}: it {cluster.standing() or 'has begun'}")
        code = cluster.follow(show)
    except KeyboardInterrupt:
        _end(cluster, job, console)
        return Interrupted.exit_code
    except BaseException:
        _end(cluster, job, console)
        raise
    clean_up(cluster, console)
    return code


def _end(cluster: SubmittedCluster, job: str, console: Console) -> None:
    """Nobody could find it again."""
    say(console, "ending it …")
    try:
        cluster.stop("now")
    except InfrastructureError as error:
        say(console, f"job {job} could not be ended, and may still be there: {error}", "yellow")
    say(console, "the shards that were made are kept: the same command goes on from there")
