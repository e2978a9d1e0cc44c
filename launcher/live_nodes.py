"""Which nodes of a Ray cluster are there now. Ray itself takes up to half a minute to notice that a machine is gone, so
every node that it calls alive is also asked for a connection."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

CONNECT_S = 1.0
"""A machine that is there answers within milliseconds, however busy."""


Absence = Literal["ended", "silent"]
"""Of a node that does not answer: its machine says that nothing listens there, so Ray has ended on it, for good; or
nobody says anything, and it may be back in a moment."""


@dataclass(frozen=True)
class Node:
    """One node. `key`: Ray's id of it; `name`: for people, unique within the cluster; `address`: of its raylet."""

    key: str
    name: str
    address: tuple[str, int]
    resources: Mapping[str, float]

    def room(self, each: Mapping[str, float]) -> int:
        """Ranks that fit on it when it is empty, of which each takes so much."""
        return int(min((self.resources.get(name, 0.0) // amount for name, amount in each.items() if amount), default=0))


class Names:
    """Of nodes, by their hosts; of several on one host by a part of their ids too. A node keeps its name."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def learn(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Name those of `ray.nodes()` that are new."""
        hosts = Counter(str(row["NodeManagerHostname"]) for row in rows if row["Alive"])
        for row in rows:
            host, key = str(row["NodeManagerHostname"]), str(row["NodeID"])
            self._names.setdefault(key, host if hosts[host] <= 1 else f"{host} ({key[:6]})")

    def __getitem__(self, key: str) -> str:
        return self._names.get(key, key[:6])


def parse_nodes(rows: Sequence[Mapping[str, Any]], names: Names) -> list[Node]:
    """Those that `ray.nodes()` calls alive."""
    names.learn(rows)
    return [
        Node(
            row["NodeID"],
            names[row["NodeID"]],
            (row["NodeManagerAddress"], int(row["NodeManagerPort"])),
            row["Resources"],
        )
        for row in rows
        if row["Alive"]
    ]


def absence(address: tuple[str, int]) -> Absence | None:
    """Why nothing takes connections there; None: something does."""
    try:
        socket.create_connection(address, timeout=CONNECT_S).close()
    except ConnectionRefusedError:
        return "ended"
    except OSError:
        return "silent"
    return None


def absent(nodes: Iterable[Node]) -> dict[str, Absence]:
    """Keys of those that do not answer, asked all at once."""
    asked = list(nodes)
    if not asked:
        return {}
    with ThreadPoolExecutor(max_workers=min(64, len(asked))) as pool:
        found = list(pool.map(absence, (node.address for node in asked)))
    return {node.key: why for node, why in zip(asked, found, strict=True) if why is not None}


class LiveNodes:
    """Of the Ray cluster that this process is connected to. `noticed`: ids of nodes that have said themselves that they
    are about to be taken away."""

    def __init__(self, noticed: Callable[[], set[str]]) -> None:
        self.names = Names()
        self._noticed = noticed

    def listed(self) -> list[Node]:
        """Those that Ray calls alive."""
        import ray

        return parse_nodes(ray.nodes(), self.names)

    def lost(self) -> dict[str, Absence]:
        """Keys of those of them that do not answer."""
        return absent(self.listed())

    def draining(self) -> set[str]:
        """Ids of nodes that are about to be taken away: a spot instance's notice, an administrator's drain."""
        from ray._private.state import state

        return self._noticed().union(state.get_draining_nodes() or {})
