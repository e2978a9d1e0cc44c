"""Ray clusters that add nodes when they are asked to: what they could add, the request, and the wait for it.

What kinds of nodes there are is read on the head, from the file that its autoscaler was started with. An autoscaler
elsewhere (KubeRay's is in a container of its own) has no such file there; then the recipe says that it scales, by
`cluster.wait_minutes`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML

from ..recipes.errors import InfrastructureError, UserError
from ..recipes.schema_cluster import RayCluster
from .base import Demand

Resources = Mapping[str, float]

WAIT_MINUTES = 30.0
"""Clouds take minutes to start a machine with GPUs, and longer to find one."""

POLL_S = 1.0
SAY_EVERY_S = 30.0
ASK_S = 60.0
HEAD = "node:__internal_head__"

Say = Callable[[str], None]


@dataclass(frozen=True)
class NodeType:
    """A kind of node that can be added, at most so many of them."""

    name: str
    resources: Resources
    most: int

    def __str__(self) -> str:
        return f"{self.name} ({shape(self.resources)}, at most {self.most})"


def shape(resources: Resources) -> str:
    """`8 GPUs and 96 cores`"""
    return f"{resources.get('GPU', 0):g} GPUs and {resources.get('CPU', 0):g} cores"


def parse_config(config: Mapping[str, Any]) -> list[NodeType]:
    """The kinds of nodes of a cluster configuration of Ray's (`ray up`'s YAML); heads are not added."""
    whole = config.get("max_workers")
    types = config.get("available_node_types") or {}
    return [
        NodeType(
            name,
            {key: float(value) for key, value in (each.get("resources") or {}).items()},
            int(each.get("max_workers", whole or 0) if whole is None else min(each.get("max_workers", whole), whole)),
        )
        for name, each in types.items()
        if name != config.get("head_node_type")
    ]


def node_types() -> list[NodeType] | None:
    """What the cluster that this process is connected to could add; None where it does not scale, as far as its head
    tells."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    head = next((node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]), None)
    if head is None:
        return None
    there = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    # A nested function travels by value: the cluster need not have our code.
    asked = ray.remote(num_cpus=0)(_reader()).options(scheduling_strategy=there).remote()
    try:
        text = ray.get(asked, timeout=ASK_S)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise InfrastructureError(f"cluster.address: the head does not answer: {error}") from error
    return None if text is None else parse_config(YAML(typ="safe").load(text))


def _reader() -> Callable[[], str | None]:
    def read() -> str | None:
        """The file that this node's autoscaler was started with."""
        import os
        from contextlib import suppress

        option = "--autoscaling-config="
        for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - it runs on the head, by itself
            with suppress(OSError):
                with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
                    words = file.read().decode(errors="replace").split("\0")
                if any(word.endswith("monitor.py") for word in words):
                    path = next((word.removeprefix(option) for word in words if word.startswith(option)), None)
                    if path:
                        with open(os.path.expanduser(path)) as config:  # noqa: PTH111, PTH123
                            return config.read()
        return None

    return read


def scales(config: RayCluster) -> bool:
    """Whether nodes that are missing can be waited for."""
    return config.wait_minutes is not None or node_types() is not None


def bundle_of(demand: Demand) -> dict[str, float]:
    """What one node must have."""
    ranks = demand.ranks // demand.nodes
    return {resource: each * ranks for resource, each in demand.resources_per_rank.items()}


def fits(bundle: Resources, resources: Resources) -> bool:
    """Whether a node has it."""
    return all(resources.get(resource, 0) >= amount for resource, amount in bundle.items())


def refusal(bundle: Resources, nodes: int, alive: Sequence[Resources], types: Sequence[NodeType] | None) -> str | None:
    """Why so many nodes of a kind can never be there; None if they can, or if it is not known what could be added.
    Pure."""
    if types is None:
        return None
    there = sum(fits(bundle, each) for each in alive)
    # Nodes that are up count among what their type may have.
    most = sum(each.most for each in types if fits(bundle, each.resources))
    head = sum(fits(bundle, each) for each in alive if HEAD in each)
    if max(there, most + head) >= nodes:
        return None
    offered = ", ".join(map(str, types)) or "none"
    return (
        f"cluster: {nodes} nodes with {shape(bundle)} are asked for, and the Ray cluster can have {most + head}. It "
        f"can add {offered}; up now: {len(alive)} nodes, {there} of that size. Ask for what it offers (--nodes, "
        "--gpus-per-node, cluster.processes_per_node), or raise max_workers in its configuration."
    )


@contextmanager
def room(config: RayCluster, demand: Demand, say: Say) -> Iterator[None]:
    """While this lasts, the cluster is asked for the nodes of a run; they are there when it begins. Raises UserError
    for what it can never have, InfrastructureError where they do not come in time."""
    from ray.autoscaler.sdk import request_resources

    bundle, needed = bundle_of(demand), demand.needed_nodes
    if _count(bundle) >= needed:
        yield
        return
    types = node_types()
    if why := refusal(bundle, needed, _alive(), types):
        raise UserError(why)
    request_resources(bundles=[bundle] * demand.nodes)
    try:
        minutes = WAIT_MINUTES if config.wait_minutes is None else config.wait_minutes
        _wait(bundle, needed, 60 * minutes, say)
        yield
    finally:
        request_resources(bundles=[])  # it may go down again


def _wait(
    bundle: Resources, nodes: int, deadline_s: float, say: Say, clock: Callable[[], float] = time.monotonic
) -> None:
    began_s = said_s = clock()
    told = -1
    while (there := _count(bundle)) < nodes:
        now_s = clock()
        if now_s - began_s > deadline_s:
            raise InfrastructureError(
                f"cluster.wait_minutes: {there} of {nodes} nodes with {shape(bundle)} are up after "
                f"{deadline_s / 60:g} minutes. `ray status` on the head says why; ask for fewer, or wait longer."
            )
        if there != told or now_s - said_s >= SAY_EVERY_S:
            say(f"waiting for the cluster to add nodes: {there} of {nodes} with {shape(bundle)} are up")
            told, said_s = there, now_s
        time.sleep(POLL_S)


def _count(bundle: Resources) -> int:
    return sum(fits(bundle, each) for each in _alive())


def _alive() -> list[Resources]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
