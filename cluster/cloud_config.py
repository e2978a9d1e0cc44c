"""A run's machines as Ray's cluster launcher is told of them. Pure."""

from __future__ import annotations

import copy
import io
import re

from ruamel.yaml import YAML

from ..recipes.schema_cloud import CloudCluster
from ..recipes.schema_nodes import most_nodes
from .cloud_boot import setup_lines
from .clouds.base import Boot, Values
from .clouds.table import cloud_of

NAME = "ftlaunch"
"""Of the cluster, for Ray's node providers: they see machines of no other. Runs are told apart by tags."""

RUN, JOB, STATE, BEGUN = "ftlaunch-run", "ftlaunch-job", "ftlaunch-state", "ftlaunch-begun"
"""Tags. STATE: STARTING until the run is under way, then RUNNING; BEGUN: when the machine was asked for, in seconds."""
STARTING, RUNNING = "starting", "running"

HEAD, WORKER = "head", "worker"


def launcher_config(config: CloudCluster, region: str, boot: Boot, private_key: str, public_key_file: str) -> Values:
    """Of all machines in one region."""
    cloud, workers = cloud_of(config.provider), most_nodes(config.nodes) - 1
    node = cloud.machine(config, region, boot)
    auth = {"ssh_user": config.user, "ssh_private_key": private_key}
    if config.provider == "azure":
        auth["ssh_public_key"] = public_key_file

    def kind(count: int) -> Values:
        return {
            "min_workers": count,
            "max_workers": count,
            "resources": {},
            "node_config": copy.deepcopy(node),
        }

    return {
        "cluster_name": NAME,
        "max_workers": workers,
        "idle_timeout_minutes": config.idle_minutes,
        "provider": cloud.provider(config, region),
        "auth": auth,
        "head_node_type": HEAD,
        "available_node_types": {HEAD: kind(0), WORKER: kind(workers)},
        "setup_commands": setup_lines(config),
    }


def tags_of(run: str, job: str, begun_s: float) -> dict[str, str]:
    """Of a machine that is asked for now, Ray's own among them."""
    label = as_label(run)
    return {
        "ray-node-name": f"ftlaunch-{label}",
        "ray-node-type": "worker",
        "ray-node-status": "up-to-date",
        "ray-user-node-type": WORKER,
        "ray-launch-config": "ftlaunch",
        RUN: label,
        JOB: job,
        STATE: STARTING,
        BEGUN: str(int(begun_s)),
    }


def as_label(run: str) -> str:
    """A run's name as all clouds take one for machines."""
    return re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:30].strip("-") or "run"


def as_yaml(values: Values) -> str:
    """As a file for `ray up`, which reads YAML 1.1."""
    yaml, text = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.version = (1, 1)
    yaml.width = 160
    yaml.dump(values, text)
    return text.getvalue()
