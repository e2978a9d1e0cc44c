"""Which hosts an `ssh` cluster has: the recipe's list, or a file's."""

from __future__ import annotations

import re
from pathlib import Path

from ..recipes.errors import KeyedError
from ..recipes.schema_cluster import SshCluster
from ..recipes.schema_nodes import least_nodes, most_nodes

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]{0,252}")


def hosts_of(config: SshCluster) -> tuple[str, ...]:
    """All of them, in order. Raises KeyedError for a file that cannot be read, and for a line that is no host."""
    if config.hostfile is None:
        return config.hosts
    path = Path(config.hostfile).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyedError(f"{path} cannot be read: {error}", "cluster.hostfile") from None
    hosts, strange = read_hosts(lines)
    if strange:
        raise KeyedError(f"{path}: {'; '.join(strange)}. One host a line, nothing behind it.", "cluster.hostfile")
    if not hosts:
        raise KeyedError(f"{path} names no host", "cluster.hostfile")
    if twice := [host for host in dict.fromkeys(hosts) if hosts.count(host) > 1]:
        raise KeyedError(f"{path}: {', '.join(twice)} more than once", "cluster.hostfile")
    return tuple(hosts)


def read_hosts(lines: list[str]) -> tuple[list[str], list[str]]:
    """(hosts, what is wrong with the other lines)."""
    words = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    named = [(number, word) for number, word in words if word]
    return (
        [word for _, word in named if _HOST.fullmatch(word)],
        [f"line {number}: {word!r} is no host's name" for number, word in named if not _HOST.fullmatch(word)],
    )


def node_count(config: SshCluster) -> int:
    """Nodes that a run has at most. Raises KeyedError as `hosts_of` does."""
    return len(hosts_of(config)) if config.nodes is None else most_nodes(config.nodes)


def needed_count(config: SshCluster) -> int:
    """Nodes that it has at least. Raises KeyedError as `hosts_of` does."""
    return len(hosts_of(config)) if config.nodes is None else least_nodes(config.nodes)
