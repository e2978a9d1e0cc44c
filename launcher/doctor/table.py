"""The table of probers: `cluster.type` -> what asks its nodes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ...recipes.errors import UserError
from ...recipes.schema_cluster import ClusterConfig

PROBERS = {
    "local": "local_nodes:LocalProber",
    "ray": "ray_nodes:ConnectedProber",
    "ssh": "ssh_nodes:SshProber",
}


def open_prober(config: ClusterConfig) -> Any:
    """A context that is an `examine.Prober`. Raises UserError for a kind of cluster whose nodes cannot be asked before
    a run has them."""
    place = PROBERS.get(config.type)
    if place is None:
        raise UserError(
            f"cluster.type {config.type}: its nodes are not there before a run is; doctor knows {', '.join(PROBERS)}. "
            "Inside an allocation, on a node, it can look at that one: cluster.type=local."
        )
    module, _, name = place.partition(":")
    return getattr(import_module(f".{module}", __package__), name)(config)
