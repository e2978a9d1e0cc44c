"""How many ranks there are, and how a global batch is dealt to them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..cluster.ssh_hosts import node_count
from ..distributed.attempt import choose_streams
from ..distributed.data.share import share_of
from ..recipes.schema import Recipe
from ..recipes.schema_cluster import ClusterConfig, LocalCluster, SshCluster
from ..recipes.schema_nodes import most_nodes
from .hardware import Machine
from .unknown import Unknown


@dataclass(frozen=True)
class WorldPlan:
    """Nodes and ranks. `device` is "cuda" or "cpu"."""

    nodes: int
    ranks_per_node: int
    device: str

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class BatchPlan:
    """How `global_batch_size` sequences become forward passes. Each rank does `accumulation` of them a step;
    `empty_sequences` of all of them hold nothing, because the batch does not divide."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    ranks: int
    streams: int
    empty_sequences: int

    @property
    def waste(self) -> float:
        """Share of a step's sequences that is empty, 0..1."""
        return self.empty_sequences / (self.global_batch_size + self.empty_sequences)


def plan_world(cluster: ClusterConfig, machine: Machine) -> WorldPlan | Unknown:
    """The world a cluster section describes, as seen from `machine`; `world_problems` tells whether it is there."""
    if cluster.gpus_per_node is not None:
        return world_of(cluster, cluster.gpus_per_node)
    if isinstance(cluster, LocalCluster):
        # At least one: more nodes than GPUs must not turn into a run on the CPU.
        return (
            WorldPlan(cluster.nodes, max(1, machine.gpus // cluster.nodes), "cuda")
            if machine.gpus
            else _on_cpu(cluster)
        )
    return Unknown(f"what each node of the {cluster.type} cluster has; give cluster.gpus_per_node")


def world_of(cluster: ClusterConfig, gpus_per_node: int) -> WorldPlan:
    """One rank per GPU; without GPUs a node is one rank unless the recipe says more."""
    return WorldPlan(nodes_of(cluster), gpus_per_node, "cuda") if gpus_per_node else _on_cpu(cluster)


def nodes_of(cluster: ClusterConfig) -> int:
    """How many a cluster section asks for; of a range, the most."""
    return node_count(cluster) if isinstance(cluster, SshCluster) else most_nodes(cluster.nodes)


def _on_cpu(cluster: ClusterConfig) -> WorldPlan:
    return WorldPlan(nodes_of(cluster), cluster.processes_per_node or 1, "cpu")


def world_problems(cluster: ClusterConfig, world: WorldPlan, machine: Machine) -> list[str]:
    """Why a run in this world would be refused on `machine`."""
    if not isinstance(cluster, LocalCluster) or world.device == "cpu" or world.ranks <= machine.gpus:
        return []
    return [
        f"cluster: {world.nodes} x {world.ranks_per_node} GPUs are asked for, this machine has {machine.gpus}. "
        "Ask for fewer (--nodes, --gpus-per-node), or train on the CPU with --gpus-per-node 0."
    ]


def world_warnings(cluster: ClusterConfig, world: WorldPlan, machine: Machine) -> list[str]:
    """What is allowed but probably not what a run for real wants."""
    if not isinstance(cluster, LocalCluster):
        return []
    warnings = []
    if world.nodes > 1:
        warnings.append(f"{world.nodes} nodes on one machine are logical nodes: good for trying out, not faster")
    if world.device == "cpu" and world.ranks > machine.cores:
        warnings.append(
            f"{world.ranks} ranks share {machine.cores} cores: it will run, more slowly than {machine.cores} ranks"
        )
    return warnings


def plan_batch(recipe: Recipe, ranks: int) -> BatchPlan:
    """Deal a global batch to ranks, as the stream will. Raises UserError for streams that do not divide it."""
    train, streams = recipe.train, choose_streams(recipe, ranks)
    share = share_of(0, ranks, streams, train.global_batch_size, train.micro_batch_size)
    return BatchPlan(
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        accumulation=share.micro_batches,
        ranks=ranks,
        streams=streams,
        empty_sequences=share.micro_batches * train.micro_batch_size * ranks - train.global_batch_size,
    )
