"""`cluster: {type: cloud}`: machines that a run takes from a cloud, and gives back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .schema_nodes import Cluster, NodeRange
from .section import NonNegativeInt, PositiveInt, VariablePattern

LoginName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
InstanceType = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Region = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=60)]
ImageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9/][A-Za-z0-9_./:()-]*$", max_length=500)]
CloudName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/@+=,-]*$", max_length=500)]
TAG_NAME = r"^[a-z][a-z0-9_-]{0,62}$"
TagValue = Annotated[str, Field(pattern=r"^[a-z0-9_-]*$", max_length=63)]
"""Both are what all three clouds take."""
FolderPath = Annotated[str, Field(pattern=r"^/[^\x00-\x1f]+$")]
PythonPath = Annotated[str, Field(pattern=r"^[^\x00-\x1f-][^\x00-\x1f]*$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4096)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class CloudCluster(Cluster):
    """Machines of AWS, Google Cloud or Azure: they are made for the run, and end with it, whatever becomes of the
    machine that submitted it."""

    type: Literal["cloud"] = "cloud"
    provider: Literal["aws", "gcp", "azure"]
    """Whose machines. Credentials are found as the provider's own tools find them."""
    instance_type: InstanceType
    """The provider's name of the kind of machine: g5.12xlarge, a2-highgpu-8g, Standard_NC24ads_A100_v4."""
    regions: Annotated[tuple[Region, ...], Field(min_length=1)]
    """Where to look for machines: the next one when there is no room or no quota in one. Of GCP: zones
    (us-central1-a). All machines of a run are in one."""
    image: ImageName | dict[str, ImageName]
    """What the disks begin as: an AMI's id, for each region its own ({us-east-1: ami-…}); a path of an image or a
    family (projects/P/global/images/family/F) at GCP; publisher:offer:sku:version or a resource's id at Azure."""
    nodes: PositiveInt | NodeRange = 1
    """Machines: a number, or {min: 6, max: 8}. The first one has the driver and rank 0."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs per machine, one rank each; None: what each has."""
    processes_per_node: PositiveInt | None = None
    """Ranks per machine where there are no GPUs; None: 1."""
    spot: bool = False
    """Spot machines: cheaper, and taken away when others pay more. Failures are met as everywhere; machines that are
    lost are not replaced before the run is started again."""
    disk_gb: PositiveInt = 200
    """Size of each machine's disk, gone with it, in GB."""
    user: LoginName = "ubuntu"
    """Who logs in: the image's own login name, with sudo."""
    identity_file: str | None = None
    """Private key for the logins. The machines are given the public one. None: one of ftlaunch's own, made once in
    ~/.config/ftlaunch."""
    ssh_config: str | None = None
    """OpenSSH's configuration file, for jump hosts; None: ~/.ssh/config."""
    private_addresses: bool = False
    """Machines get no public addresses: this machine reaches them over a VPN, a jump host, or is one of the cloud's."""
    setup: tuple[Line, ...] = ()
    """Lines of bash, run on each machine before anything else: packages, mounts. One that fails ends the run."""
    python: PythonPath | None = None
    """Python on the machines, with ftlaunch's dependencies installed; None: a virtual environment is made of the
    image's python3, with the versions that this machine has. ftlaunch's own code is sent along."""
    env: tuple[VariablePattern, ...] = ()
    """Variables that the ranks get from here: [HF_TOKEN, AWS_*]. They travel in a file of mode 600."""
    shared_paths: tuple[FolderPath, ...] = ()
    """Folders that the lines of `setup` mount on all machines, and that are still there afterwards. Without one,
    checkpoint.path has to be in an object store: the machines' disks go with them."""
    identity: CloudName | None = None
    """As whom the machines reach other services of the cloud, such as buckets: an instance profile (name or ARN) at
    AWS, a service account's email at GCP. None: as nobody; at GCP machines that end are then stopped, not deleted."""
    project: CloudName | None = None
    """GCP: id of the project."""
    subscription: CloudName | None = None
    """Azure: id of the subscription."""
    resource_group: CloudName | None = None
    """Azure: the resource group, made where it is not there."""
    tags: dict[str, TagValue] = {}
    """Of the machines: {team: nlp}. ftlaunch's own say which run they are for."""
    machine: dict[str, Any] = {}
    """More of a machine in the provider's own terms, over what ftlaunch says: {SubnetIds: [subnet-…]}. It is the
    `node_config` of Ray's cluster launcher."""
    prices: dict[str, PositiveFloat] = {}
    """US dollars for an hour of a kind of machine, for the estimate of `ftlaunch plan`. They win over ftlaunch's table
    of list prices."""
    idle_minutes: PositiveFloat = 10.0
    """A machine on which nothing of a run happens for so long ends itself. Longer than a machine takes to start."""
    max_hours: PositiveFloat | None = None
    """After so many hours a machine ends itself, whatever it does: a bound of what a run may cost. None: no bound."""
    doctor: bool = True
    """Measure the machines before a run on more than one, as `ftlaunch doctor` does elsewhere; unfit ones are left
    out."""
