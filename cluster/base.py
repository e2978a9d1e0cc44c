"""The seam between a run and where its nodes come from.

A cluster yields the address of a Ray cluster with enough room, and takes down what it started. What runs there is the
same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Demand:
    """What a run asks of a cluster: `ranks` in all, on `nodes` nodes, with one GPU each or none, and `cpus_per_rank`
    cores each."""

    nodes: int
    ranks: int
    uses_gpus: bool
    cpus_per_rank: int

    @property
    def resources_per_rank(self) -> dict[str, float]:
        """In Ray's terms."""
        return {"CPU": self.cpus_per_rank, **({"GPU": 1} if self.uses_gpus else {})}


@dataclass(frozen=True)
class Endpoint:
    """A Ray cluster this process is connected to."""

    address: str


CodeFolder = Callable[[], Path]
"""Makes a folder named `ftlaunch` with the package's files, to be shipped to nodes that do not share ours."""


class Cluster(Protocol):
    """One kind of cluster. Adding one: a file beside this, a union member in the schema, a line in `table.py`, a
    recipe, its tests."""

    def problems(self) -> list[str]:
        """What the user must mend before this can start, found without starting anything."""
        ...

    def render(self) -> str:
        """What would be started or submitted, as text that a person can read and apply by hand."""
        ...

    def up(self, code: CodeFolder) -> Endpoint:
        """Bring Ray up (or find it) and connect to it, so that its workers can import ftlaunch. Raises UserError or
        InfrastructureError."""
        ...

    def down(self) -> None:
        """Disconnect, and end what `up` started; what was there before stays."""
        ...
