"""The recipe's `cluster` section: where a run's nodes come from, one class per kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .schema_cloud import CloudCluster
from .schema_kubernetes import KubernetesCluster
from .schema_nodes import Cluster, NodeRange
from .section import NonNegativeInt, PositiveInt, Section, VariablePattern

HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:%-]*$", max_length=253)]
UserName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
ProgramPath = Annotated[str, Field(pattern=r"^[^\x00-\x1f-][^\x00-\x1f]*$")]
OneLine = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4096)]
SlurmTime = Annotated[str, Field(pattern=r"^(\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2})$")]
SlurmMemory = Annotated[str, Field(pattern=r"^\d+[KMGT]?$")]
SlurmOption = Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(=[^\x00-\x1f\x7f]*)?$", max_length=4096)]
MailType = Literal["BEGIN", "END", "FAIL", "REQUEUE", "ALL", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50"]


class LocalCluster(Cluster):
    """Ray on this machine, started for the run."""

    type: Literal["local"] = "local"
    nodes: PositiveInt = 1
    """Logical nodes. More than one on a machine is for trying things out."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs per node, one rank each; None: all there are, divided among the nodes."""
    processes_per_node: PositiveInt | None = None
    """Ranks per node where there are no GPUs; None: 1."""


class RayCluster(Cluster):
    """A Ray cluster that is already running."""

    type: Literal["ray"] = "ray"
    address: str = "auto"
    """`auto` (found on this machine), or HOST:PORT of the head."""
    nodes: PositiveInt | NodeRange = 1
    """Nodes to use: a number, or {min: 6, max: 8}."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs per node, one rank each; None: what each node of the cluster offers."""
    processes_per_node: PositiveInt | None = None
    """Ranks per node where there are no GPUs; None: 1."""
    doctor: bool = True
    """Measure the nodes before a run on more than one, as `ftlaunch doctor` does; unfit ones are left out."""
    wait_minutes: Annotated[float, Field(gt=0)] | None = None
    """How long to wait for an autoscaling cluster to add the nodes that are missing; None: 30 where its head says that
    it scales, and not at all elsewhere."""


class SshCluster(Cluster):
    """Hosts that we can log in to with OpenSSH: Ray is started on them for the run, and gone with it. The run goes on
    without the machine that submitted it."""

    type: Literal["ssh"] = "ssh"
    hosts: tuple[HostName, ...] = ()
    """Names or addresses as `ssh` takes them, aliases of ~/.ssh/config too. The first runs the driver, Ray's head and
    rank 0. Either this or hostfile."""
    hostfile: str | None = None
    """A file with one host a line; `#` begins a remark."""
    nodes: PositiveInt | NodeRange | None = None
    """Nodes to use, the first ones: a number, or {min: 6, max: 8}; None: all hosts."""
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


class SlurmContainer(Section):
    """A container that everything on the nodes runs in; the batch script itself does not."""

    runtime: Literal["pyxis", "apptainer"]
    """`pyxis`: srun's --container-image, where the site has the plugin; `apptainer`: the program of that name."""
    image: OneLine
    """As the runtime takes it: a registry's name, a .sqsh or a .sif file."""
    mounts: tuple[OneLine, ...] = ()
    """PATH or FROM:TO, besides the folder of the runs and the one where `ftlaunch` is called."""


class SlurmCluster(Cluster):
    """Nodes that Slurm gives: one job, submitted by sbatch, in which Ray is started on every node. At its time limit,
    or when its nodes are taken away, it saves, goes back into the queue, and on from there. Inside an allocation
    (salloc) it takes that one's nodes."""

    type: Literal["slurm"] = "slurm"
    nodes: PositiveInt = 1
    """Nodes to ask for; inside an allocation, how many of its nodes to use."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs per node, one rank each, asked for by --gpus-per-node unless gres is given; None: none are asked for, and
    what each node then shows is used."""
    processes_per_node: PositiveInt | None = None
    """Ranks per node where there are no GPUs; None: 1."""
    doctor: bool = True
    """Measure the nodes before a run on more than one, as `ftlaunch doctor` does elsewhere; where one is unfit the job
    goes back into the queue, to have another one in its place."""
    partition: OneLine | None = None
    """Partition, or several with commas; None: the site's default, as for the options that follow."""
    account: OneLine | None = None
    """Whom the time is charged to."""
    qos: OneLine | None = None
    """Quality of service."""
    constraint: OneLine | None = None
    """Features that nodes must have: a100&ib."""
    reservation: OneLine | None = None
    """Name of a reservation."""
    gres: OneLine | None = None
    """Generic resources of a node, in place of the count of GPUs: gpu:a100:8."""
    time: SlurmTime | None = None
    """Time limit of the job: minutes, H:MM:SS or D-HH:MM. A run may take many times as long."""
    cpus_per_node: PositiveInt | None = None
    """Cores of each node. Sites that give one core where nothing is said are common."""
    memory: SlurmMemory | None = None
    """Memory of each node: 500G; 0: all of it."""
    exclusive: bool = False
    """No other job on the nodes, and all of their cores."""
    mail_user: OneLine | None = None
    """Who gets Slurm's mail."""
    mail_types: tuple[MailType, ...] = ()
    """About what."""
    options: tuple[SlurmOption, ...] = ()
    """More options of sbatch, as they are: ["--nice=100", "--exclude=node7"]."""
    modules: tuple[OneLine, ...] = ()
    """Environment modules, loaded one by one on the first node, whose variables go to all."""
    setup: tuple[OneLine, ...] = ()
    """Lines of bash, run after that; one that fails ends the job."""
    container: SlurmContainer | None = None
    """What to run in; None: the nodes as they are."""
    python: ProgramPath | None = None
    """Python on the nodes, with ftlaunch's dependencies installed; None: the path of the one that runs this command,
    and python3 in a container. ftlaunch's own code is sent along."""
    env: tuple[VariablePattern, ...] = ()
    """Variables that the ranks get from here: [HF_TOKEN, AWS_*]. They travel in a file of mode 600; no others do."""
    requeue: bool = True
    """Go back into the queue at the time limit, at preemption, and when a machine fails; false: save and end."""
    leave_before_s: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the time limit at which the run saves and leaves. Longer than its longest step and save together;
    Slurm may be a minute early."""
    queue_timeout_s: PositiveInt | None = None
    """Seconds in the queue after which a job that has not begun is taken out of it, while somebody follows it; None: it
    may wait as long as it likes."""
    allocation: Literal["auto", "new"] = "auto"
    """`auto`: inside an allocation, use it; `new`: submit a job of its own from there too."""


ClusterConfig = Annotated[
    LocalCluster | RayCluster | SshCluster | SlurmCluster | KubernetesCluster | CloudCluster,
    Field(discriminator="type"),
]
