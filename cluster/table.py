"""The table of clusters: `cluster.type` -> where its class is."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..recipes.schema_cluster import ClusterConfig
from .base import Cluster, Demand, Need, Record, SubmittedCluster

CLUSTERS = {
    "local": "local:Local",
    "ray": "existing:Existing",
}
"""Joined by the process that drives."""

SUBMITTED_CLUSTERS = {
    "ssh": "ssh:Ssh",
    "slurm": "slurm:Slurm",
    "kubernetes": "kubernetes:Kubernetes",
    "cloud": "cloud:Cloud",
}
"""Where the driver runs on a node."""


def build_cluster(config: ClusterConfig, demand: Demand) -> Cluster:
    """The cluster that a recipe asks for, to be joined."""
    cluster: Cluster = _find(CLUSTERS[config.type])(config, demand)
    return cluster


def is_submitted(config: ClusterConfig) -> bool:
    """Whether runs are submitted there, and driven on a node."""
    return config.type in SUBMITTED_CLUSTERS


def is_run_here(config: ClusterConfig) -> bool:
    """Whether this machine sees the directories of runs that are submitted there (`SubmittedCluster.run_is_here`)."""
    here: bool = _find(SUBMITTED_CLUSTERS[config.type]).run_is_here
    return here


def build_submitted(config: ClusterConfig, need: Need) -> SubmittedCluster:
    """The cluster that a recipe asks for, to be submitted to."""
    cluster: SubmittedCluster = _find(SUBMITTED_CLUSTERS[config.type])(config, need)
    return cluster


def find_submitted(record: Record) -> SubmittedCluster:
    """The cluster that a run was submitted to, to follow or to stop it there. Raises UserError and InfrastructureError
    if it cannot be reached."""
    cluster: SubmittedCluster = _find(SUBMITTED_CLUSTERS[record["cluster"]["type"]]).find(record)
    return cluster


def _find(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f".{module}", __package__), name)
