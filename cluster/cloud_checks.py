"""What is wrong with a `cloud` cluster for a run, found before any machine is made."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import PurePosixPath

from ..recipes.schema_cloud import CloudCluster
from .base import Need
from .cloud_access import key_problems
from .cloud_machines import meant, missing_packages
from .clouds.table import cloud_of
from .ssh_job import unset


def problems(config: CloudCluster, need: Need) -> list[str]:
    """All of it. Raises InfrastructureError where the provider does not answer."""
    found = [f"cluster.env: {name} is not set here" for name in unset(config.env, need.environ)]
    found += [f"{name} is not installed here (OpenSSH's client)" for name in _programs()]
    found += key_problems(config) if shutil.which("ssh-keygen") else []
    found += paths(config, need)
    if missing := missing_packages(config.provider):
        found.append(missing)
    if not found:  # what can be seen here is mended first, without asking anybody
        cloud = cloud_of(config.provider)
        with meant(cloud, config.provider):
            found += cloud.problems(config)
    return found


def _programs() -> list[str]:
    return [name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None]


def paths(config: CloudCluster, need: Need) -> Iterator[str]:
    """The machines' disks go with them, and they see nothing of this machine."""
    read = {**need.paths, **need.patterns}
    if need.shared is not None and not _is_shared(config, need.shared):
        yield (
            f"{need.shared_setting}: {need.shared} would be on the machines' own disks, which go with them. Name an "
            "object store (s3://…), or a folder that cluster.setup mounts, and that folder in cluster.shared_paths"
        )
    for key, path in read.items():
        if not _is_shared(config, path):
            yield (
                f"{key}: {path} is a file of this machine; the cloud's do not see it. Name an object store (s3://…), "
                "or a path below one of cluster.shared_paths"
            )


def _is_shared(config: CloudCluster, path: str) -> bool:
    place = PurePosixPath(path)
    return ".." not in place.parts and any(place.is_relative_to(each) for each in config.shared_paths)
