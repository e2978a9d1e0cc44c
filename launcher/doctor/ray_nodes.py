"""The nodes of a Ray cluster: an actor on each calls the probes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...cluster.existing import connect
from ...recipes.schema_cluster import RayCluster
from ..package import write_package
from .examine import NodeError

ANSWER_S = 120.0


class NodeProbe:
    """The actor."""

    def call(self, name: str, question: dict[str, Any]) -> Any:
        """One of `host_probe.PROBES`."""
        from ...cluster.host_probe import PROBES

        return PROBES[name](question)


class Hold:
    """An actor that takes what a node has, so that nothing else is placed there."""

    def ready(self) -> None:
        """It is there."""


class RayProber:
    """Of the cluster that this process is connected to."""

    def __init__(self) -> None:
        import ray

        self._alive = [node for node in ray.nodes() if node["Alive"]]
        names = _names(self._alive)
        self.ids = {name: str(node["NodeID"]) for name, node in names.items()}
        self.resources: dict[str, Mapping[str, float]] = {name: node["Resources"] for name, node in names.items()}
        self.nodes = tuple(names)
        self.addresses = {name: str(node["NodeManagerAddress"]) for name, node in names.items()}
        self.unreached: dict[str, str] = {}
        self._actors = {name: _placed(NodeProbe, self.ids[name], {}) for name in names}

    def ask(self, node: str, probe: str, **question: Any) -> Any:
        """See `examine.Prober`."""
        import ray

        try:
            return ray.get(self._actors[node].call.remote(probe, question), timeout=ANSWER_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise NodeError(f"its probe does not answer: {str(error).strip().splitlines()[-1]}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        for actor in self._actors.values():
            ray.kill(actor)


class ConnectedProber(RayProber):
    """Of a `ray` cluster that is connected to for this alone."""

    def __init__(self, config: RayCluster) -> None:
        with tempfile.TemporaryDirectory(prefix="ftlaunch-code-") as folder:
            connect(config.address, {"py_modules": [str(write_package(Path(folder)))]})
        super().__init__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        super().__exit__(kind, error, trace)
        ray.shutdown()


def _names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Nodes by host name; by address or id where that is not one node's."""
    count = Counter(node["NodeManagerHostname"] for node in nodes)

    def name(node: Mapping[str, Any]) -> str:
        host = str(node["NodeManagerHostname"])
        return host if count[host] == 1 else f"{host}/{node['NodeID'][:8]}"

    return {name(node): node for node in nodes}


def _placed(kind: type, node_id: str, resources: Mapping[str, float]) -> Any:
    """An actor on one node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 0)
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=cpus, num_gpus=gpus)(kind).options(scheduling_strategy=there).remote()


@contextmanager
def held(prober: RayProber, nodes: Sequence[str]) -> Iterator[None]:
    """Some nodes are taken, so that ranks are placed on the others. A node on which others work already cannot be taken
    whole, and is not."""
    import ray

    holds = [_placed(Hold, prober.ids[node], prober.resources[node]) for node in nodes]
    try:
        ray.wait([hold.ready.remote() for hold in holds], num_returns=len(holds), timeout=5.0) if holds else None
        yield
    finally:
        for hold in holds:
            ray.kill(hold)
