"""A Ray cluster that is already running: joined, and left as it was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..recipes.errors import InfrastructureError, UserError
from ..recipes.schema_cluster import RayCluster
from ..recipes.schema_nodes import least_nodes
from . import autoscaling
from .base import CodeFolder, Demand, Endpoint
from .ray_driver_compat import say_nothing_of_services
from .ray_settings import quiet

Resources = Mapping[str, float]
"""Of one node, in Ray's terms."""


class Existing:
    """The `ray` cluster."""

    def __init__(self, config: RayCluster, demand: Demand) -> None:
        self._config, self._demand = config, demand

    def problems(self) -> list[str]:
        """None that can be found without connecting."""
        return []

    def render(self) -> str:
        return f"ray.init(address={self._config.address!r})"

    def up(self, code: CodeFolder) -> Endpoint:
        address = connect(self._config.address, {"py_modules": [str(code())]})
        missing = self._missing()
        if missing and not autoscaling.scales(self._config):  # others are asked for what is missing, by `room`
            raise UserError(missing)
        return Endpoint(address)

    def _missing(self) -> str:
        """What the nodes that are up lack; empty if nothing."""
        nodes = nodes_for_ranks(_alive_nodes(), 1 if self._demand.uses_gpus else 0)
        needed = self._demand.needed_nodes
        if len(nodes) < needed:
            return (
                f"cluster.nodes: {needed} nodes are asked for, the Ray cluster at {self._config.address} "
                f"has {len(nodes)}. Ask for fewer (--nodes {len(nodes)}) or add nodes."
            )
        for resource, each in self._demand.resources_per_rank.items():
            have = sum(node.get(resource, 0) for node in nodes)
            ranks = needed * self._demand.ranks_per_node
            if have < each * ranks:
                return (
                    f"cluster: {ranks} ranks need {each * ranks:g} {resource}, the Ray "
                    f"cluster at {self._config.address} has {have:g}."
                )
        return ""

    def down(self) -> None:
        import ray

        ray.shutdown()


@dataclass(frozen=True)
class Offer:
    """What every node that ranks can run on has at least."""

    gpus_per_node: int
    cpus_per_node: int


def ask(config: RayCluster) -> Offer:
    """Look at a running cluster. Raises InfrastructureError if it does not answer, and UserError if it has no node of
    the kind that is asked for."""
    import ray

    connect(config.address, {})
    try:
        every = _alive_nodes()
        if len(nodes_for_ranks(every, config.gpus_per_node)) < least_nodes(config.nodes):
            # An autoscaling cluster's nodes are what it can add.
            every = [*every, *(each.resources for each in autoscaling.node_types() or () if each.most)]
    finally:
        ray.shutdown()
    nodes = nodes_for_ranks(every, config.gpus_per_node)
    if not nodes:
        has = ", ".join(f"{node.get('GPU', 0):g} GPUs and {node.get('CPU', 0):g} cores" for node in every)
        raise UserError(
            f"cluster.gpus_per_node: no node of the Ray cluster at {config.address} has "
            f"{config.gpus_per_node or 'a core or'} GPUs; they have {has}."
        )
    return Offer(
        gpus_per_node=int(min(node.get("GPU", 0) for node in nodes)),
        cpus_per_node=int(min(node.get("CPU", 0) for node in nodes)),
    )


def nodes_for_ranks(nodes: Sequence[Resources], gpus_per_node: int | None) -> list[Resources]:
    """Those of a cluster's nodes on which ranks can run: the ones with so many GPUs. None: the ones with any, or all
    with cores where none has a GPU. A head, which often has neither, then decides nothing."""
    if gpus_per_node is None:
        gpus_per_node = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
    return [
        node for node in nodes if node.get("GPU", 0) >= gpus_per_node and (gpus_per_node or node.get("CPU", 0) >= 1)
    ]


def connect(address: str, runtime_env: dict[str, Any]) -> str:
    """Connect this process to a running cluster, whose workers get `runtime_env`; its address. Raises
    InfrastructureError if none answers."""
    quiet()
    import ray

    say_nothing_of_services()
    try:
        context = ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise InfrastructureError(
            f"cluster.address: no Ray cluster answers at {address}: {error}. Start one with `ray start --head`, or "
            "leave `cluster:` out to train on this machine."
        ) from error
    found: str = context.address_info["gcs_address"]
    return found


def _alive_nodes() -> list[Resources]:
    """Resources of each node that is up."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
