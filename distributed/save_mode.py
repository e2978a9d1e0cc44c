"""Whether checkpoints are written beside the training: where every host has room for the copies that this takes."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..recipes.errors import UserError
from .checkpoint.peers import Peers
from .data.memory import free_bytes, size_text

Mode = Literal["async", "sync"]

ROOM = 0.5
"""Share of a host's free memory that copies may take by themselves: reading ahead and page caches want some too."""


class Room(NamedTuple):
    """What copies take, of one rank or of all ranks of a host, and what the host has free."""

    host: str
    copy_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return f"{self.host}: {size_text(self.copy_bytes)} of copies, {size_text(self.free_bytes)} free"


def agree_on_mode(wanted: Literal["auto", "async", "sync"], copy_bytes: int, peers: Peers) -> tuple[Mode, str]:
    """The mode, and a note for the user where it is not the usual one; collective.

    Raises UserError on every rank when `async` is demanded where it cannot be."""
    everyone = peers.gather(Room(socket.gethostname(), copy_bytes, free_bytes()))
    return choose_mode(wanted, hosts_of(everyone))


def hosts_of(ranks: Sequence[Room]) -> list[Room]:
    """Ranks gathered by host."""
    hosts = {}
    for name in dict.fromkeys(rank.host for rank in ranks):
        mine = [rank for rank in ranks if rank.host == name]
        hosts[name] = Room(name, sum(r.copy_bytes for r in mine), min(r.free_bytes for r in mine))
    return list(hosts.values())


def choose_mode(wanted: Literal["auto", "async", "sync"], hosts: Sequence[Room]) -> tuple[Mode, str]:
    """See `agree_on_mode`."""
    if wanted == "sync":
        return "sync", ""
    limit = 1.0 if wanted == "async" else ROOM
    full = [host for host in hosts if host.copy_bytes > limit * host.free_bytes]
    if not full:
        return "async", ""
    listed = "; ".join(map(str, full[:3]))
    if wanted == "async":
        raise UserError(f"checkpoint.mode: async keeps a copy of what is saved in host memory; {listed}. Set sync.")
    return "sync", f"checkpoints are written while training waits: copies may take {ROOM:.0%} of free memory; {listed}"
