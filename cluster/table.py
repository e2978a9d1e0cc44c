"""The table of clusters: `cluster.type` -> where its class is."""

from __future__ import annotations

from importlib import import_module

from ..recipes.schema import ClusterConfig
from .base import Cluster, Demand

CLUSTERS = {
    "local": "local:Local",
    "ray": "existing:Existing",
}


def build_cluster(config: ClusterConfig, demand: Demand) -> Cluster:
    """The cluster that a recipe asks for."""
    module, _, name = CLUSTERS[config.type].partition(":")
    cluster: Cluster = getattr(import_module(f".{module}", __package__), name)(config, demand)
    return cluster
