"""What hosts must be able to do together: reach each other, and see the same files. Tried, not asked."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .base import Need
from .ssh_connection import HostError
from .ssh_fleet import Fleet

TOKEN = ".ftlaunch-token-"  # noqa: S105 - a file's name
"""Begins the name of a file by which a shared folder is known. It goes at once."""

ALL_PORTS = "Nodes must reach each other on all TCP ports."


class Network(NamedTuple):
    """By which address the others reach each host; empty if there are problems."""

    addresses: dict[str, str]
    problems: list[str]


def network(fleet: Fleet, known: Sequence[str]) -> Network:
    """Find an address of the first host, of those it is `known` to have, by which all others reach it; theirs are those
    they come from. Then let everybody try everybody. Raises HostError."""
    ports = {host: answer["port"] for host, answer in fleet.ask_all("listen").items()}
    first, *others = fleet.hosts
    candidates = list(known) or ["127.0.0.1"]
    own = fleet.ask_all("reach", targets=[[address, ports[first]] for address in candidates])
    good = [n for n in range(len(candidates)) if all(own[host]["own"][n] for host in others)]
    if not good:
        lost = [host for host in others if not any(own[host]["own"])] or others
        said = f"host {', '.join(lost)}: does not reach {first} at {' or '.join(candidates)}. {ALL_PORTS}"
        return Network({}, [said])
    addresses = {first: candidates[good[0]]} | {host: own[host]["own"][good[0]] for host in others}
    return Network(addresses, _mesh(fleet, addresses, ports))


def _mesh(fleet: Fleet, addresses: Mapping[str, str], ports: Mapping[str, int]) -> list[str]:
    reached = fleet.ask_all("reach", targets=[[addresses[host], ports[host]] for host in fleet.hosts])
    return [
        f"host {host}: does not reach {other} at {addresses[other]}. {ALL_PORTS}"
        for host, answer in reached.items()
        for other, own in zip(fleet.hosts, answer["own"], strict=True)
        if not own
    ]


def shared(fleet: Fleet, need: Need) -> list[str]:
    """A file that the first host writes is read on all others. Raises HostError."""
    if need.shared is None:
        return []
    token, first = secrets.token_hex(16), fleet.hosts[0]
    path = str(Path(need.shared) / (TOKEN + token))
    try:
        fleet.ask(first, "put_token", path=path, token=token)
        found = fleet.ask_all("get_token", path=path)
    except HostError as error:
        return [f"{need.shared_setting}: {need.shared} cannot be written: {error}"]
    finally:
        with contextlib.suppress(HostError):
            fleet.ask(first, "remove_token", path=path)
    lost = [host for host, answer in found.items() if answer["token"] != token]
    if not lost:
        return []
    return [
        f"host {', '.join(lost)}: {need.shared_setting} {need.shared} is not the folder that {first} sees under this "
        "name. Name a folder that all nodes share, or an object store (s3://…)."
    ]


def paths(fleet: Fleet, need: Need) -> list[str]:
    """The recipe's own files, on every node. Raises HostError."""
    answers = fleet.ask_all("missing", paths=list(need.paths.values()))
    return [
        f"host {host}: {key}: {path} is not there"
        for host, answer in answers.items()
        for key, path in need.paths.items()
        if path in answer["missing"]
    ]
