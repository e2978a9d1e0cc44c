"""The seam between a run and where its nodes come from.

There are two kinds. One is joined: it yields the address of a Ray cluster that this process connects to and drives, and
takes down what it started (`Cluster`). On the other the driver runs too, on a node, so that the run goes on without
this process (`SubmittedCluster`); there the driver finds itself on a cluster to join. What runs is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Demand:
    """What a run asks of a cluster: `ranks` in all, on `nodes` nodes (the most it uses), with one GPU each or none, and
    `cpus_per_rank` cores each."""

    nodes: int
    ranks: int
    uses_gpus: bool
    cpus_per_rank: int
    least_nodes: int | None = None
    """With so many it begins, and goes on when others are lost; None: with all."""

    @property
    def ranks_per_node(self) -> int:
        """The same on each."""
        return self.ranks // self.nodes

    @property
    def needed_nodes(self) -> int:
        """Without which nothing starts."""
        return self.nodes if self.least_nodes is None else self.least_nodes

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


@dataclass(frozen=True)
class Need:
    """What a run needs of nodes that are elsewhere, besides room."""

    folder: str
    """Where its relative paths begin."""
    shared: str | None = None
    """A folder that all nodes must share; None: what is written goes to an object store."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Key of the recipe -> file or folder that must be there on every node."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Key of the recipe -> pattern of files on a disk."""
    name: str = "run"
    """The run's."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """The variables here, of which `cluster.env` names those that travel."""
    tell: Callable[[str], None] = lambda _line: None
    """Says to whoever waits how far nodes that take minutes are."""
    shared_setting: str = "checkpoint.path"
    """What names `shared`."""


@dataclass(frozen=True)
class Driver:
    """The program that drives a run on a node: `ENTRY JOB ADDRESS` (see `launcher/drive.py` and
    `launcher/prepare_drive.py`)."""

    entry: str
    """`module:function`."""
    job: Callable[[Demand], Mapping[str, Any]]
    """What it is told, as JSON, once it is known what the nodes have. There may be secrets in it. The cluster adds
    `record`; one that knows its nodes only when they are there puts its own `demand` in."""


Stop = Literal["save", "now"]
"""Save after the step at hand and end, or end at once."""

Record = Mapping[str, Any]
"""Of a submission, as JSON without secrets: with it any machine that reaches the cluster can find it again. `job`, its
name there; `driver`, where that runs; `cluster`, the section it was submitted to; `ends_first`, whether all of a job
has ended when the cluster starts it again; `replaces`, whether it can have other nodes then; the rest is the cluster's
own. The driver keeps it in the run directory."""


class SubmittedCluster(Protocol):
    """One kind of cluster that a run is submitted to. Adding one: as for `Cluster`."""

    run_is_here: bool
    """Whether this machine sees the run directory as the nodes do. Then the run is looked at before anything waits for
    nodes, and it is known to be submitted before its driver begins."""

    def problems(self) -> list[str]:
        """What the user must mend before this can start, all of it. Raises InfrastructureError if all that is wrong
        is that machines or networks are down."""
        ...

    def render(self) -> str:
        """What would be started or submitted, as text that a person can read."""
        ...

    def up(self, driver: Driver, code: CodeFolder) -> Record:
        """Start the driver and what it needs, and let go: from here on the run does without us. Raises UserError or
        InfrastructureError, and then leaves nothing running."""
        ...

    def follow(self, write: Callable[[bytes], None]) -> int:
        """Pass on what the driver prints until it ends; its exit code. Raises InfrastructureError if it was lost."""
        ...

    def standing(self) -> str | None:
        """How the job stands, in words that go behind its name: that it waits, and for what, or where it runs; None: it
        is over. Raises InfrastructureError."""
        ...

    def stop(self, how: Stop) -> None:
        """End the run, and wait until nothing of it is left on any node."""
        ...

    def down(self) -> None:
        """Let go of what this process holds. What `up` has not let go of ends, everything else stays."""
        ...
