"""Rules of `cluster: {type: kubernetes}` that span its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from .problems import Problem
from .schema import Recipe
from .schema_kubernetes import KEY, KubernetesCluster

OWN_PATHS = ("/mnt/ftlaunch", "/dev/shm", "/proc", "/sys")  # noqa: S108 - names of mounts
"""What is mounted in the pods already."""


def kubernetes_volumes(recipe: Recipe) -> Iterator[Problem]:
    """Each at a place of its own."""
    if not isinstance(recipe.cluster, KubernetesCluster):
        return
    paths: dict[PurePosixPath, int] = {}
    for index, volume in enumerate(recipe.cluster.volumes):
        key, path = f"cluster.volumes.{index}.path", PurePosixPath(volume.path)
        if ".." in path.parts or any(
            path == PurePosixPath(own) or PurePosixPath(own) in path.parents for own in OWN_PATHS
        ):
            yield Problem(key, f"{volume.path} is taken, or no plain path", "mount it elsewhere: /data")
        if path in paths:
            yield Problem(key, f"volume {paths[path]} is mounted there too", "mount each volume at a path of its own")
        paths.setdefault(path, index)


def kubernetes_keys(recipe: Recipe) -> Iterator[Problem]:
    """Kubernetes would refuse them."""
    if not isinstance(recipe.cluster, KubernetesCluster):
        return
    for section in ("labels", "annotations", "node_selector", "resources"):
        for name in getattr(recipe.cluster, section):
            if not re.fullmatch(KEY, name):
                message = f"{name!r} is no key of Kubernetes"
                yield Problem(f"cluster.{section}", message, "write NAME or DOMAIN/NAME: acme.com/team")


def kubernetes_queues(recipe: Recipe) -> Iterator[Problem]:
    """Kueue starts whole jobs itself; a gang's queue needs its scheduler."""
    cluster = recipe.cluster
    if not isinstance(cluster, KubernetesCluster):
        return
    if cluster.queue is not None and cluster.gang_scheduler is not None:
        message = "Kueue (cluster.queue) starts all pods or none by itself"
        yield Problem("cluster.gang_scheduler", message, "leave one of the two out")
    if cluster.gang_queue is not None and cluster.gang_scheduler is None:
        remedy = "name cluster.gang_scheduler, or use cluster.queue for Kueue"
        yield Problem("cluster.gang_queue", "means something only with a gang scheduler", remedy)
    if cluster.gang_queue is not None and cluster.gang_scheduler == "scheduler-plugins":
        yield Problem("cluster.gang_queue", "scheduler-plugins has no queues", "leave it out")
