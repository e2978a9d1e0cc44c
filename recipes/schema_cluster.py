"""The recipe's `cluster` section: where a run's nodes come from, one class per kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .schema_kubernetes import KubernetesCluster
from .section import NonNegativeInt, PositiveInt, Section, VariablePattern

HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:%-]*$", max_length=253)]
UserName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
ProgramPath = Annotated[str, Field(pattern=r"^[^\x00-\x1f-][^\x00-\x1f]*$")]


class LocalCluster(Section):
    """Ray on this machine, started for the run."""

    type: Literal["local"] = "local"
    nodes: PositiveInt = 1
    """Logical nodes. More than one on a machine is for trying things out."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs per node, one rank each; None: all there are, divided among the nodes."""
    processes_per_node: PositiveInt | None = None
    """Ranks per node where there are no GPUs; None: 1."""


class RayCluster(Section):
    """A Ray cluster that is already running."""

    type: Literal["ray"] = "ray"
    address: str = "auto"
    """`auto` (found on this machine), or HOST:PORT of the head."""
    nodes: PositiveInt = 1
    """Nodes to use."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs per node, one rank each; None: what each node of the cluster offers."""
    processes_per_node: PositiveInt | None = None
    """Ranks per node where there are no GPUs; None: 1."""
    doctor: bool = True
    """Measure the nodes before a run on more than one, as `ftlaunch doctor` does; unfit ones are left out."""
    wait_minutes: Annotated[float, Field(gt=0)] | None = None
    """How long to wait for an autoscaling cluster to add the nodes that are missing; None: 30 where its head says that
    it scales, and not at all elsewhere."""


class SshCluster(Section):
    """Hosts that we can log in to with OpenSSH: Ray is started on them for the run, and gone with it. The run goes on
    without the machine that submitted it."""

    type: Literal["ssh"] = "ssh"
    hosts: tuple[HostName, ...] = ()
    """Names or addresses as `ssh` takes them, aliases of ~/.ssh/config too. The first runs the driver, Ray's head and
    rank 0. Either this or hostfile."""
    hostfile: str | None = None
    """A file with one host a line; `#` begins a remark."""
    nodes: PositiveInt | None = None
    """Nodes to use, the first ones; None: all hosts."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs per node, one rank each; None: what each host has."""
    processes_per_node: PositiveInt | None = None
    """Ranks per node where there are no GPUs; None: 1."""
    user: UserName | None = None
    """Who logs in; None: as OpenSSH's configuration says."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of sshd; None: as OpenSSH's configuration says."""
    identity_file: str | None = None
    """Private key; None: what OpenSSH's configuration says and ssh-agent holds."""
    ssh_config: str | None = None
    """OpenSSH's configuration file; None: ~/.ssh/config. Jump hosts, aliases and known hosts are said there."""
    python: ProgramPath | None = None
    """Python on the hosts, with ftlaunch's dependencies installed; None: the path of the one that runs this command.
    ftlaunch's own code is sent along."""
    env: tuple[VariablePattern, ...] = ()
    """Variables that the ranks get from here: [HF_TOKEN, AWS_*]. They travel in a file of mode 600."""
    doctor: bool = True
    """Measure the hosts before a run on more than one, as `ftlaunch doctor` does; unfit ones are replaced by hosts
    beyond `nodes`, where there are any."""


ClusterConfig = Annotated[LocalCluster | RayCluster | SshCluster | KubernetesCluster, Field(discriminator="type")]
