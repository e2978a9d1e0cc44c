"""The doctor before a run on several nodes: unfit ones are left out, or the run is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from ...cluster.base import Demand
from ...cluster.existing import nodes_for_ranks
from ...cluster.ssh_hosts import hosts_of, needed_count, node_count
from ...recipes.errors import InfrastructureError
from ...recipes.load import LoadedRecipe
from ...recipes.schema_cluster import SshCluster
from ...recipes.schema_nodes import NodeRange
from .command import findings_of, unfit_text, wanted_of
from .examine import Say, examine
from .judge import Finding, judge, unfit

LOOKED_AT = frozenset({"ssh"})
"""Clusters whose nodes were looked at before the run was submitted."""


def has_spares(loaded: LoadedRecipe) -> bool:
    """Whether there are hosts that could stand in for others."""
    config = loaded.recipe.cluster
    return isinstance(config, SshCluster) and config.doctor and len(hosts_of(config)) > node_count(config)


def with_fit_hosts(loaded: LoadedRecipe, environ: Mapping[str, str], say: Say) -> LoadedRecipe:
    """The recipe without hosts that are unfit. Raises InfrastructureError where too few are left."""
    config = loaded.recipe.cluster
    if not isinstance(config, SshCluster) or not config.doctor or node_count(config) < 2:
        return loaded
    wanted = wanted_of(config, loaded.recipe.checkpoint.path, environ)
    findings = findings_of(config, wanted, lambda _line: None)
    bad = _told(findings, say)
    good = tuple(host for host in hosts_of(config) if host not in bad)
    if len(good) < needed_count(config):
        raise InfrastructureError(
            f"{unfit_text(bad)}\n{needed_count(config)} nodes are asked for, and {len(good)} are fit. Mend them, name "
            f"other hosts, or ask for fewer (--nodes {max(1, len(good))}); cluster.doctor=false goes without this look."
        )
    if not bad:
        return loaded
    nodes = config.nodes if isinstance(config.nodes, NodeRange) else node_count(config)
    changed = config.model_copy(update={"hosts": good, "hostfile": None, "nodes": nodes})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"cluster": changed}))


class UnfitNodes(InfrastructureError):
    """Too few nodes are fit. `says`: what is wrong with the others; `addresses`: theirs."""

    def __init__(self, bad: Mapping[str, list[str]], addresses: Sequence[str], remedy: str) -> None:
        self.says = unfit_text(bad)
        self.addresses = addresses
        super().__init__(f"{self.says}\n{remedy}")


@contextmanager
def on_fit_nodes(loaded: LoadedRecipe, demand: Demand, say: Say) -> Iterator[None]:
    """While this lasts, ranks are placed on fit nodes of the Ray cluster that we are connected to. Raises UnfitNodes
    where there are too few."""
    config = loaded.recipe.cluster
    with ExitStack() as holds:
        if getattr(config, "doctor", False) and config.type not in LOOKED_AT and demand.nodes > 1:
            from .ray_nodes import RayProber, held

            prober = holds.enter_context(RayProber())
            wanted = wanted_of(config, loaded.recipe.checkpoint.path, {})
            bad = _told(judge(examine(prober, wanted, lambda _line: None)), say)
            fit = [resources for node, resources in prober.resources.items() if node not in bad]
            enough = nodes_for_ranks(fit, 1 if demand.uses_gpus else 0)
            if len(enough) < (needed := demand.needed_nodes):
                raise UnfitNodes(
                    bad, [prober.addresses[node] for node in bad],
                    f"{needed} nodes are asked for, and {len(enough)} are fit. Mend them, or ask for fewer "
                    f"(--nodes {max(1, len(enough))}); cluster.doctor=false goes without this look.",
                )  # fmt: skip
            holds.enter_context(held(prober, list(bad)))
        yield


def _told(findings: list[Finding], say: Say) -> dict[str, list[str]]:
    """Unfit nodes; what is odd or bad is said."""
    for finding in findings:
        if finding.verdict != "good":
            said = "left out" if finding.verdict == "bad" else "odd"
            say(f"node {finding.node}: {finding.check}: {finding.text} ({said})")
    return unfit(findings)
