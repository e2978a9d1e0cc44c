"""What is wrong with some hosts, from what they say of themselves. Pure: every rule is told of all hosts at once."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import requires
from typing import Any

from packaging.requirements import Requirement

from ..recipes.schema_cluster import SshCluster

OLDEST_PYTHON = (3, 11)
CLOCKS_S = 5.0
"""Apart. Signs of life in the run directory carry the time, and so do credentials of object stores."""

FREE_BYTES = 2 << 30
"""For Ray's files and logs, on the disk of the temporary folder."""

ALIKE = ("ray", "torch", "transformers", "peft", "numpy", "safetensors", "tokenizers", "pyarrow")
"""Packages of which all nodes must have the same version: they speak with each other, or compute the same numbers."""


@dataclass(frozen=True)
class Facts:
    """Of one host: what `host_agent.facts` answers, and by how many seconds its clock is ahead of ours."""

    said: Mapping[str, Any]
    ahead_s: float

    def __getitem__(self, name: str) -> Any:
        return self.said[name]


Hosts = Mapping[str, Facts]
"""Facts by host, in the order of the nodes."""


def requirements() -> dict[str, Requirement]:
    """What ftlaunch needs at the least, by name."""
    parsed = map(Requirement, requires("ftlaunch") or ())
    return {each.name: each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})}


def problems(config: SshCluster, hosts: Hosts, wanted: Mapping[str, Requirement]) -> list[str]:
    """Everything, by host where it is one host's."""
    return [*unfit(config.gpus_per_node, hosts, wanted), *_same_machine(hosts), *_clocks(hosts)]


def unfit(gpus_per_node: int | None, hosts: Hosts, wanted: Mapping[str, Requirement]) -> list[str]:
    """What is wrong with hosts wherever they come from."""
    rules = [*_systems(hosts), *_packages(hosts, wanted), *_gpus(gpus_per_node, hosts), *_disks(hosts)]
    return [*rules, *_differ(hosts)]


def _systems(hosts: Hosts) -> Iterator[str]:
    for host, facts in hosts.items():
        if facts["system"] != "Linux":
            yield f"host {host}: it runs {facts['system']}; nodes must run Linux"
        if tuple(map(int, facts["python"].split(".")[:2])) < OLDEST_PYTHON:
            oldest = ".".join(map(str, OLDEST_PYTHON))
            yield f"host {host}: cluster.python is Python {facts['python']}; ftlaunch needs {oldest} or newer"


def _packages(hosts: Hosts, wanted: Mapping[str, Requirement]) -> Iterator[str]:
    for host, facts in hosts.items():
        has = facts["packages"]
        bad = [need for need in wanted.values() if not _fits(has.get(need.name), need)]
        if bad:
            listed = ", ".join(f"{need.name}{need.specifier} ({has.get(need.name) or 'not there'})" for need in bad)
            install = " ".join(f"'{need}'" for need in bad)
            yield f"host {host}: ftlaunch needs {listed}; there: {facts['executable']} -m pip install {install}"


def _fits(version: str | None, need: Requirement) -> bool:
    return version is not None and need.specifier.contains(version, prereleases=True)


def _gpus(gpus_per_node: int | None, hosts: Hosts) -> Iterator[str]:
    most = max(facts["gpus"] for facts in hosts.values())
    for host, facts in hosts.items():
        if gpus_per_node is not None and facts["gpus"] < gpus_per_node:
            yield (
                f"host {host}: cluster.gpus_per_node is {gpus_per_node}, it has {facts['gpus']}. Leave the host "
                "out, ask for fewer, or train on CPUs with --gpus-per-node 0."
            )
        elif gpus_per_node is None and facts["gpus"] != most:
            yield f"host {host}: it has {facts['gpus']} GPUs, others have {most}; say cluster.gpus_per_node"


def _disks(hosts: Hosts) -> Iterator[str]:
    for host, facts in hosts.items():
        if facts["free_bytes"] < FREE_BYTES:
            yield (
                f"host {host}: {facts['free_bytes'] / 1e9:.1f} GB are free at {facts['scratch']}, "
                f"{FREE_BYTES / 1e9:.1f} GB are needed; free some, or set TMPDIR for logins to another disk"
            )


def _same_machine(hosts: Hosts) -> Iterator[str]:
    for names in _alike(hosts, lambda facts: facts["boot"]).values():
        if len(names) > 1:
            yield f"cluster.hosts: {' and '.join(names)} are the same machine; name each once"


def _differ(hosts: Hosts) -> Iterator[str]:
    """A node with other versions than its peers would fail late, or compute something else."""
    for name in ("Python", *ALIKE):
        found = {key: names for key, names in _alike(hosts, partial(_version, name)).items() if key}
        if len(found) > 1:
            listed = ", ".join(f"{key} on {', '.join(names)}" for key, names in found.items())
            yield f"hosts differ: {name} is {listed}; install the same on all"


def _version(name: str, facts: Facts) -> str | None:
    found: str | None = facts["python"] if name == "Python" else facts["packages"].get(name)
    return found


def _alike(hosts: Hosts, of: Callable[[Facts], Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = defaultdict(list)
    for host, facts in hosts.items():
        groups[of(facts)].append(host)
    return groups


def _clocks(hosts: Hosts) -> Iterator[str]:
    usual = statistics.median_low([0.0, *(facts.ahead_s for facts in hosts.values())])
    for host, facts in hosts.items():
        if abs(facts.ahead_s - usual) > CLOCKS_S:
            yield f"host {host}: its clock is {facts.ahead_s - usual:+.0f} s off the others'; let NTP set it"
