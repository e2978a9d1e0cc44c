"""`ftlaunch prepare recipe.yaml --to PLACE`: rows tokenised on CPU nodes with Ray Data, for GPU nodes that never do. It
is driven from here, or from a node of the cluster that it is submitted to; the shards are the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from ..cluster.base import Cluster, Demand
from ..cluster.table import build_cluster, is_submitted
from ..distributed import storage
from ..recipes.errors import InfrastructureError, UserError
from ..recipes.load import LoadedRecipe
from ..recipes.schema_cluster import ClusterConfig
from .hardware import this_machine
from .plan_world import nodes_of
from .prepare_shards import MADE, RECIPE, make_shards
from .prepare_submit import submit_preparation
from .say import say


def prepare(loaded: LoadedRecipe, config: ClusterConfig, to: str, environ: Mapping[str, str]) -> int:
    """Tokenise everything that the recipe reads into shards below `to`, and write the recipe that trains on them;
    returns the exit code. `config`: the cluster that does it, which need not be the recipe's own. `environ`: of which
    variables may travel.

    What is there already from an earlier, broken-off try is kept. Raises UserError, InfrastructureError."""
    console = Console()
    if storage.is_local(to):
        to = str(storage.local_path(to).absolute())  # workers have folders of their own
    beside = Path(loaded.path).with_suffix(".prepared.yaml")
    _refuse_other_file(beside)
    if is_submitted(config):
        if code := submit_preparation(loaded, config, to, environ, console):
            return code
    else:
        make_shards(loaded, to, _cluster(config), console)
    _copy_recipe(storage.join(to, RECIPE), beside, console)
    return 0


def _refuse_other_file(path: Path) -> None:
    """Only a recipe that was made here is written over."""
    if path.exists() and not path.read_text().startswith(MADE):
        raise UserError(f"{path} is there, and `ftlaunch prepare` did not make it. Move it, or rename the recipe.")


def _cluster(config: ClusterConfig) -> Cluster:
    """Ray, on every core of this machine or where it is; no GPUs are asked for."""
    nodes = 1 if config.type == "local" else nodes_of(config)
    return build_cluster(config, Demand(nodes=nodes, ranks=this_machine().cores, uses_gpus=False, cpus_per_rank=1))


def _copy_recipe(made: str, beside: Path, console: Console) -> None:
    """The recipe over the shards, beside the one it was made of, where this machine sees it."""
    try:
        beside.write_bytes(storage.read_bytes(made))
    except (UserError, InfrastructureError, FileNotFoundError):
        say(console, f"the recipe that trains on it is {made}, which this machine does not see")
        return
    say(console, f"train on it: ftlaunch {beside}")
