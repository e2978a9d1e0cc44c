"""What is wrong with the nodes of a `slurm` job, and where they reach each other, from what all of them said. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..recipes.schema_cluster import SlurmCluster
    from .base import Demand

Said = Mapping[str, Any]
"""Of one node: what `slurm_look.look` answers."""


def lacking(nodes: Sequence[Said], wanted: Mapping[str, str]) -> list[str]:
    """Nodes without packages of ours: name -> requirement. Nothing of ours may be imported before this is empty."""
    found = []
    for said in nodes:
        gone = [text for name, text in wanted.items() if said["packages"].get(name) is None]
        if gone:
            install = " ".join(f"'{text}'" for text in gone)
            found.append(
                f"node {said['name']}: ftlaunch needs {', '.join(gone)}, which {said['executable']} does not have; "
                f"there: {said['executable']} -m pip install {install}"
            )
    return found


def problems(config: SlurmCluster, spec: Mapping[str, Any], nodes: Sequence[Said]) -> list[str]:
    """Everything else."""
    from packaging.requirements import Requirement

    from .ssh_facts import Facts, unfit

    facts = {said["name"]: Facts(said, 0.0) for said in nodes}
    wanted = {name: Requirement(text) for name, text in spec["wanted"].items()}
    found = unfit(config.gpus_per_node, facts, wanted)
    named = [text.replace("host ", "node ", 1).replace("hosts differ", "nodes differ", 1) for text in found]
    return [*named, *_strangers(spec, nodes), *_paths(spec, nodes)]


def _strangers(spec: Mapping[str, Any], nodes: Sequence[Said]) -> Iterator[str]:
    lost = [said["name"] for said in nodes if said["proof"] != spec["proof"]]
    if lost:
        yield (
            f"node {', '.join(lost)}: {spec['folder']} is not the folder that was written where the job was submitted. "
            "Name a checkpoint.path (--to of prepare) that all nodes share."
        )


def _paths(spec: Mapping[str, Any], nodes: Sequence[Said]) -> Iterator[str]:
    for said in nodes:
        for key, path in spec["paths"].items():
            if path in said["missing"]:
                yield f"node {said['name']}: {key}: {path} is not there"


def addresses(nodes: Sequence[Said]) -> dict[str, str]:
    """By which address the others reach each node: the one it has on the way to where Slurm's own step was launched
    from. That is the first node itself in a batch job; then it is the address that the others know."""
    first, *others = nodes
    own = str(first["address"])
    if own.startswith("127.") and others:
        own = str(others[0]["launcher"])
    return {first["name"]: own} | {said["name"]: str(said["address"]) for said in others}


def demand_of(config: SlurmCluster, nodes: Sequence[Said]) -> Demand:
    """Ranks and cores, from what the nodes have."""
    from .base import Demand

    gpus = min(said["gpus"] for said in nodes) if config.gpus_per_node is None else config.gpus_per_node
    ranks = gpus or config.processes_per_node or 1
    cores = min(said["cores"] for said in nodes)
    return Demand(len(nodes), ranks * len(nodes), uses_gpus=gpus > 0, cpus_per_rank=max(1, cores // ranks))
