"""`ftlaunch prepare` on a cluster whose nodes are elsewhere: submitted as a run is, and followed to its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from ..cluster.base import Demand, Driver, SubmittedCluster
from ..distributed import storage
from ..recipes.errors import Interrupted
from ..recipes.load import LoadedRecipe
from .handover import pack
from .package import write_package
from .say import say
from .submit import checked, need_of

ENTRY = "ftlaunch.launcher.prepare_drive:main"


def submit_preparation(loaded: LoadedRecipe, to: str, environ: Mapping[str, str], console: Console) -> int:
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
    say(console, f"looking at the {recipe.cluster.type} cluster …")
    cluster = checked(recipe.cluster.model_copy(update={"gpus_per_node": 0}), need)  # cores make tokens
    try:
        with TemporaryDirectory(prefix="ftlaunch-code-") as folder:
            record = cluster.up(Driver(ENTRY, _job_of(loaded, to)), lambda: write_package(Path(folder)))
        say(console, f"submitted as job {record['job']}: it {cluster.standing() or 'has begun'}")
        return _follow(cluster, console)
    finally:
        cluster.down()


def _job_of(loaded: LoadedRecipe, to: str) -> Any:
    def job(demand: Demand) -> dict[str, Any]:
        return {"loaded": pack(loaded), "to": to, "demand": asdict(demand), "columns": Console().width}

    return job


def _follow(cluster: SubmittedCluster, console: Console) -> int:
    try:
        code = cluster.follow(_show)
    except KeyboardInterrupt:
        say(console, "ending it …")
        cluster.stop("now")
        say(console, "the shards that were made are kept: the same command goes on from there")
        return Interrupted.exit_code
    cluster.stop("now")  # until nothing of it is left
    return code


def _show(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
