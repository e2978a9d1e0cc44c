"""Conversations with many hosts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from .ssh_connection import Connection, HostError

AT_ONCE = 64
"""Hosts that are asked at the same time."""


class Fleet:
    """Connections to some hosts, in the order of the nodes."""

    def __init__(self, connections: Mapping[str, Connection]) -> None:
        self._connections = dict(connections)

    @property
    def hosts(self) -> list[str]:
        """Their names."""
        return list(self._connections)

    def ask(self, host: str, question: str, **details: Any) -> Any:
        """One of them. Raises HostError."""
        return _named(lambda: self._connections[host].ask(question, **details), host)

    def ask_all(self, question: str, **details: Any) -> dict[str, Any]:
        """All of them the same. Raises HostError with what all say that cannot answer."""
        return self.each(lambda host: self.ask(host, question, **details))

    def each(self, do: Callable[[str], Any]) -> dict[str, Any]:
        """Do something for all hosts at once. Raises HostError as `ask_all` does."""
        done = _together(partial(_told, do), self._connections)
        failed = [error for error in done.values() if isinstance(error, HostError)]
        if failed:
            raise HostError("\n".join(map(str, failed)), mendable=any(error.mendable for error in failed))
        return done

    def close(self) -> None:
        """Let go of all. What was started there and not released ends."""
        _together(lambda host: self._connections[host].close(), self._connections)
        self._connections = {}


class Opened(NamedTuple):
    """The hosts that answer, and why the others do not."""

    fleet: Fleet
    failed: dict[str, HostError]


def open_fleet(commands: Mapping[str, list[str]]) -> Opened:
    """Connect to hosts, each by its command."""
    opened = _together(partial(_told, lambda host: _named(lambda: Connection(host, commands[host]), host)), commands)
    return Opened(
        Fleet({host: found for host, found in opened.items() if isinstance(found, Connection)}),
        {host: error for host, error in opened.items() if isinstance(error, HostError)},
    )


def _named(do: Callable[[], Any], host: str) -> Any:
    try:
        return do()
    except HostError as error:
        raise HostError(f"host {host}: {error}", mendable=error.mendable) from error


def _told(do: Callable[[str], Any], host: str) -> Any:
    """What comes of it, a HostError too."""
    try:
        return do(host)
    except HostError as error:
        return error


def _together(do: Callable[[str], Any], hosts: Iterable[str]) -> dict[str, Any]:
    names = list(hosts)
    with ThreadPoolExecutor(max(1, min(len(names), AT_ONCE))) as pool:
        return dict(zip(names, pool.map(do, names), strict=True))
