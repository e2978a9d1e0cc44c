"""This machine."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from ...cluster.host_probe import PROBES
from ...recipes.schema_cluster import LocalCluster

NAME = "this machine"


class LocalProber:
    """Of a `local` cluster, whose nodes are all this machine."""

    def __init__(self, _config: LocalCluster) -> None:
        self.nodes = (NAME,)
        self.addresses: dict[str, str] = {}
        self.unreached: dict[str, str] = {}

    def ask(self, _node: str, probe: str, **question: Any) -> Any:
        """See `examine.Prober`."""
        return PROBES[probe](question)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
