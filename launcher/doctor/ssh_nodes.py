"""Hosts over SSH: all that a recipe names, spare ones too."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...cluster import host_probe
from ...cluster.ssh_connection import HostError, ssh_command
from ...cluster.ssh_fleet import open_fleet
from ...cluster.ssh_hosts import hosts_of
from ...recipes.schema_cluster import SshCluster
from .examine import NodeError


class SshProber:
    """Of an `ssh` cluster."""

    def __init__(self, config: SshCluster) -> None:
        python = config.python or sys.executable
        opened = open_fleet({host: ssh_command(config, host, python) for host in hosts_of(config)})
        self._fleet = opened.fleet
        self._taught: set[str] = set()
        self._text = Path(host_probe.__file__).read_text(encoding="utf-8")
        self.unreached = {host: str(error) for host, error in opened.failed.items()}
        self.nodes = tuple(self._fleet.hosts)
        self.addresses = self._addresses()

    def _addresses(self) -> dict[str, str]:
        """The first that a host names is the one that we have come in by."""
        try:
            facts = self._fleet.ask_all("facts", packages=[])
        except HostError:
            return {}  # the questions that follow tell of it
        return {host: said["addresses"][0] for host, said in facts.items() if said["addresses"]}

    def ask(self, node: str, probe: str, **question: Any) -> Any:
        """See `examine.Prober`."""
        text = {} if node in self._taught else {"text": self._text}
        try:
            answer = self._fleet.ask(node, "probe", call=probe, **text, **question)
        except HostError as error:
            raise NodeError(str(error)) from error
        self._taught.add(node)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fleet.close()
