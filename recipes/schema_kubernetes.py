"""`cluster: {type: kubernetes}`: what a run asks of a Kubernetes cluster with KubeRay. Names are Kubernetes' own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .schema_nodes import Cluster
from .section import NonNegativeInt, PositiveInt, Section, VariablePattern

Label = Annotated[str, Field(pattern=r"^[a-z0-9]+(-+[a-z0-9]+)*$", max_length=63)]
"""RFC 1123: namespaces, Secrets, claims and others whose names become parts of names."""
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]+([-.]+[a-z0-9]+)*$", max_length=253)]
KEY = r"^([a-z0-9]+([-.]+[a-z0-9]+)*/)?[A-Za-z0-9]+([-_.]+[A-Za-z0-9]+)*$"
LabelKey = Annotated[str, Field(pattern=KEY, max_length=317)]
"""Of labels, annotations, resources and taints: NAME or DOMAIN/NAME."""
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]+([-_.]+[A-Za-z0-9]+)*)?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
"""Such as 500m, 4, 64Gi."""
ImageName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][-a-zA-Z0-9._/:@]*$", max_length=512)]
MountPath = Annotated[str, Field(pattern=r"^/[^\x00-\x1f:]+$")]


class Toleration(Section):
    """A taint of nodes that the pods put up with."""

    key: LabelKey
    """Of the taint, such as nvidia.com/gpu."""
    value: LabelValue | None = None
    """Of the taint; None: any."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Of the taint; None: any."""


class Volume(Section):
    """A volume that every pod mounts."""

    claim: Label
    """Name of a PersistentVolumeClaim in the namespace. More than one node needs one that many can mount at once."""
    path: MountPath
    """Where it is mounted. Paths of the recipe below it are files on it."""
    read_only: bool = False
    """Whether nothing may be written."""


class KubernetesCluster(Cluster):
    """Pods of a Kubernetes cluster with KubeRay: a RayJob is made for the run, and gone with it. The run goes on
    without the machine that submitted it."""

    type: Literal["kubernetes"] = "kubernetes"
    image: ImageName
    """Container image with ftlaunch's dependencies, Ray's dashboard included (`ray[default]`). k8s/Dockerfile makes
    one. ftlaunch's own code is sent along."""
    nodes: PositiveInt = 1
    """Pods, Ray's head among them; the head runs the driver and rank 0."""
    gpus_per_node: NonNegativeInt
    """GPUs of each pod, one rank each; 0: train on CPUs."""
    processes_per_node: PositiveInt | None = None
    """Ranks per pod where there are no GPUs; None: 1."""
    doctor: bool = True
    """Measure the pods before a run on more than one, as `ftlaunch doctor` does elsewhere; where a node is
    unfit the job is started again on others."""
    cpus_per_node: PositiveInt | None = None
    """Cores that each pod requests, shared by its ranks; None: 8 for each GPU, 1 for each rank without."""
    memory: Quantity | None = None
    """Memory of each pod, its limit too; None: what the node has."""
    shared_memory: Quantity = "8Gi"
    """Most that /dev/shm may hold, through which NCCL and Ray pass data. It counts as memory of the pod."""
    gpu_resource: LabelKey = "nvidia.com/gpu"
    """What the cluster calls a GPU."""
    resources: dict[str, PositiveInt | Quantity] = {}
    """More that each pod has: {rdma/hca: 8}, {vpc.amazonaws.com/efa: 32}."""
    context: str | None = None
    """Of the kubeconfig; None: the current one."""
    kubeconfig: str | None = None
    """File; None: as kubectl finds it, or the pod's own account where this runs in a cluster."""
    namespace: Label | None = None
    """None: the context's."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """None: Kubernetes' own, Always for the tag `latest`, otherwise IfNotPresent."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    """Secrets that open the registry."""
    python: Annotated[str, Field(pattern=r"^[^\x00-\x20-][^\x00-\x1f]*$")] = "python"
    """Python in the image."""
    service_account: ObjectName | None = None
    """Account of the pods, which an object store may know (IRSA, Workload Identity); None: the namespace's default.
    No token for Kubernetes' own API is mounted."""
    env: tuple[VariablePattern, ...] = ()
    """Variables that the ranks get from here: [HF_TOKEN, AWS_*]. They travel in a Secret of the run's own."""
    env_from_secrets: tuple[ObjectName, ...] = ()
    """Secrets of the namespace whose keys become variables of the ranks: credentials that are kept there."""
    volumes: tuple[Volume, ...] = ()
    """Volumes that every pod mounts. Without one, paths of files are refused: nodes see nothing of this machine."""
    node_selector: dict[str, LabelValue] = {}
    """Labels of the nodes to run on: {nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of nodes that the pods put up with."""
    priority_class: ObjectName | None = None
    """PriorityClass of the pods."""
    labels: dict[str, LabelValue] = {}
    """Labels of the RayJob and its pods: a cost centre."""
    annotations: dict[str, str] = {}
    """Annotations of the pods: {sidecar.istio.io/inject: "false"}."""
    queue: Label | None = None
    """Kueue's LocalQueue. The job is made suspended, and Kueue starts it when there is room for all of it."""
    gang_scheduler: Literal["volcano", "yunikorn", "kai-scheduler", "scheduler-plugins"] | None = None
    """Batch scheduler that KubeRay's operator is set up with (`--batch-scheduler`): all pods start, or none."""
    gang_queue: LabelValue | None = None
    """Queue of that scheduler; None: its default."""
    backoff_limit: NonNegativeInt = 0
    """Times KubeRay starts the job again when its nodes are lost; it continues from the newest checkpoint. A mistake
    of the user's is not tried again."""
    start_deadline_seconds: PositiveInt | None = None
    """The job is given up when its pods are not up so long after it left its queue; None: they are waited for."""
    active_deadline_seconds: PositiveInt | None = None
    """The job is ended, after saving, so long after it left its queue; None: it may take any time."""
    termination_grace_period_seconds: Annotated[int, Field(ge=60)] = 600
    """Between the request to end (stop, eviction, preemption) and the end: long enough for the step at hand, a
    checkpoint, and half a minute of Ray's own."""
    pod_disruption_budget: bool = True
    """Whether drains of nodes wait for the run, as far as they may."""
    run_as_user: PositiveInt | None = None
    """User id in the pods; None: the image's, which must not be root."""
    fs_group: PositiveInt | None = 1000
    """Group id to which volumes belong; None: as they are."""
