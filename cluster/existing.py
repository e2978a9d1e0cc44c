"""A Ray cluster that is already running: joined, and left as it was found."""

from __future__ import annotations

from ..recipes.errors import InfrastructureError, UserError
from ..recipes.schema import RayCluster
from .base import Demand, Endpoint
from .ray_settings import quiet


class Existing:
    """The `ray` cluster."""

    def __init__(self, config: RayCluster, demand: Demand) -> None:
        self._config, self._demand = config, demand

    def problems(self) -> list[str]:
        """None that can be found without connecting."""
        return []

    def render(self) -> str:
        return f"ray.init(address={self._config.address!r})"

    def up(self) -> Endpoint:
        quiet()
        import ray

        try:
            context = ray.init(address=self._config.address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise InfrastructureError(
                f"cluster.address: no Ray cluster answers at {self._config.address}: {error}. Start one with "
                "`ray start --head`, or leave `cluster:` out to train on this machine."
            ) from error
        self._check_room()
        return Endpoint(address=context.address_info["gcs_address"], shares_files=False)

    def _check_room(self) -> None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if len(nodes) < self._demand.nodes:
            raise UserError(
                f"cluster.nodes: {self._demand.nodes} nodes are asked for, the Ray cluster at {self._config.address} "
                f"has {len(nodes)}. Ask for fewer (--nodes {len(nodes)}) or add nodes."
            )
        for resource, each in self._demand.resources_per_rank.items():
            have = sum(node.get(resource, 0) for node in nodes)
            if have < each * self._demand.ranks:
                raise UserError(
                    f"cluster: {self._demand.ranks} ranks need {each * self._demand.ranks:g} {resource}, the Ray "
                    f"cluster at {self._config.address} has {have:g}."
                )

    def down(self) -> None:
        import ray

        ray.shutdown()
