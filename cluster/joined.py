"""A Ray cluster that was started for this run, with this process on its first node: joined, and ended by who started
it."""

from __future__ import annotations

import socket
import time

from ..recipes.errors import InfrastructureError
from .base import CodeFolder, Demand, Endpoint
from .ray_driver_compat import say_nothing_of_services
from .ray_settings import quiet

WAIT_S = 180.0
"""For Ray on this host, then for all others: they were seen to start, at about the same time."""

OTHERS_S = 20.0
"""For the others, where there are enough to begin; who comes later is used when the run grows."""

POLL_S = 0.2


class Joined:
    """What a submitted run's driver is on."""

    def __init__(self, address: str, demand: Demand) -> None:
        self._address, self._demand = address, demand
        quiet()

    def problems(self) -> list[str]:
        """None: the hosts were asked before anything started."""
        return []

    def render(self) -> str:
        return f"ray.init(address={self._address!r})"

    def up(self, _code: CodeFolder) -> Endpoint:
        import ray

        self._wait_for_ray()
        say_nothing_of_services()
        ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        self._wait_for_nodes()
        return Endpoint(self._address)

    def _wait_for_ray(self) -> None:
        host, _, port = self._address.rpartition(":")
        deadline_s = time.monotonic() + WAIT_S
        while not _listens(host, int(port)):
            if time.monotonic() > deadline_s:
                raise InfrastructureError(f"Ray did not begin to answer at {self._address} within {WAIT_S:g} s")
            time.sleep(POLL_S)

    def _wait_for_nodes(self) -> None:
        import ray

        deadline_s = time.monotonic() + WAIT_S
        enough_s = deadline_s if self._demand.least_nodes is None else time.monotonic() + OTHERS_S
        while len(there := [node for node in ray.nodes() if node["Alive"]]) < self._demand.nodes:
            if len(there) >= self._demand.needed_nodes and time.monotonic() > enough_s:
                return
            if time.monotonic() > deadline_s:
                names = ", ".join(node["NodeManagerHostname"] for node in there)
                raise InfrastructureError(
                    f"{len(there)} of {self._demand.needed_nodes} nodes have joined within {WAIT_S:g} s: {names}"
                )
            time.sleep(POLL_S)

    def down(self) -> None:
        import ray

        ray.shutdown()


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True
