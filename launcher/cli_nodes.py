"""The commands that look at a cluster or make it ready. Registered by `cli.py`; parsing only, as there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..recipes.errors import UserError
from .cli_recipe import AS_WRITTEN, Overrides, Place, RecipePath, environment, load


def doctor(
    recipe: Annotated[Path | None, Parameter(help="The recipe, a YAML file; or --cluster NAME alone.")] = None,
    /,
    *overrides: Overrides,
    place: Place = AS_WRITTEN,
    json: bool = False,
) -> int:
    """Measure the nodes of a cluster: versions, clocks, disks, arithmetic, memory, GPUs, network, storage.

    Parameters
    ----------
    json
        Print JSON.
    """
    from ..recipes.load import load_cluster
    from .doctor.command import here, run_doctor

    if recipe is not None:
        loaded = load(recipe, overrides, place).recipe
        return run_doctor(loaded.cluster, loaded.checkpoint.path, environment(), as_json=json)
    if place.cluster is None:
        raise UserError("doctor: name a recipe, or a profile with --cluster NAME")
    return run_doctor(load_cluster(place.cluster, here(), environment()), None, environment(), as_json=json)


def download(
    recipe: RecipePath,
    /,
    *overrides: Overrides,
    place: Place = AS_WRITTEN,
    to: Path = Path("downloads"),
    everything: bool = False,
) -> int:
    """Fetch model and data of a hub or the web, for nodes that cannot, and write the recipe that reads them here.

    Parameters
    ----------
    to
        Folder for them, which the nodes see too.
    everything
        Fetch what lies in object stores too.
    """
    from .download.command import download as fetch

    return fetch(load(recipe, overrides, place), to, everything=everything)
