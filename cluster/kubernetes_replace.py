"""Has a job that has found nodes unfit started again on others: its RayJob is suspended and told which nodes to keep
off, and released once its pods are gone. Whoever follows the job does that, for pods have no rights of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..recipes.errors import InfrastructureError
from .kubernetes_api import Api, ApiError, Object
from .kubernetes_checks import rayjobs
from .kubernetes_job import QUEUE

KEPT_OFF = "ftlaunch/kept-off"
"""Annotation of a RayJob: the nodes, with commas. A suspended job that has it was not suspended by Kueue."""

HOSTNAME = "kubernetes.io/hostname"


def kept_off(rayjob: Object) -> list[str]:
    """Nodes that a job keeps off already."""
    names = (rayjob["metadata"].get("annotations") or {}).get(KEPT_OFF, "")
    return [name for name in names.split(",") if name]


def nodes_of(pods: Mapping[str, Object], addresses: Collection[str]) -> list[str]:
    """Names of the nodes on which the pods with these addresses are."""
    found = {
        pod["spec"].get("nodeName") for pod in pods.values() if (pod.get("status") or {}).get("podIP") in addresses
    }
    return sorted(filter(None, found))


def keeping_off(cluster: Object, nodes: Sequence[str]) -> Object:
    """The spec of a RayCluster, no pod of which is placed on these nodes."""
    off = {"key": HOSTNAME, "operator": "NotIn", "values": list(nodes)}
    required = {"nodeSelectorTerms": [{"matchExpressions": [off]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}

    def moved(group: Object) -> Object:
        template = group["template"]
        spec = {**template["spec"], "affinity": {**(template["spec"].get("affinity") or {}), **affinity}}
        return {**group, "template": {**template, "spec": spec}}

    changed = {**cluster, "headGroupSpec": moved(cluster["headGroupSpec"])}
    if "workerGroupSpecs" in cluster:
        changed["workerGroupSpecs"] = [moved(group) for group in cluster["workerGroupSpecs"]]
    return changed


@dataclass
class Replacement:
    """Of one job. `name`: of its RayJob; `write` gets what is to be shown."""

    api: Api
    name: str
    write: Callable[[bytes], None]
    _heard: set[str] = field(default_factory=set)
    """Heads whose word was acted upon: later pods may have the addresses of earlier ones."""
    _released: str = ""
    """Version of the RayJob that was released; what is known of it may be older for a moment."""

    def look(self, rayjob: Object, pods: Mapping[str, Object], head: str, unfit: Collection[str]) -> None:
        """Do what is to be done now. `unfit`: addresses of the pods whose nodes are not fit, as the driver in this head
        has it."""
        new = [] if head in self._heard else nodes_of(pods, unfit)
        if new and self._suspend(rayjob, sorted({*kept_off(rayjob), *new}), new):
            self._heard.add(head)
        elif self._waits_for_release(rayjob) and self._patch({"spec": {"suspend": False}}, ""):
            self._released = rayjob["metadata"]["resourceVersion"]

    def _waits_for_release(self, rayjob: Object) -> bool:
        """Kueue releases jobs of its queues itself."""
        status, metadata = rayjob.get("status") or {}, rayjob["metadata"]
        is_ours = bool(kept_off(rayjob)) and QUEUE not in (metadata.get("labels") or {})
        is_down = rayjob["spec"].get("suspend") and status.get("jobDeploymentStatus") == "Suspended"
        return bool(is_ours and is_down and metadata["resourceVersion"] != self._released)

    def _suspend(self, rayjob: Object, nodes: Sequence[str], new: Sequence[str]) -> bool:
        spec = {"suspend": True, "rayClusterSpec": keeping_off(rayjob["spec"]["rayClusterSpec"], nodes)}
        change = {"metadata": {"annotations": {KEPT_OFF: ",".join(nodes)}}, "spec": spec}
        return self._patch(change, f"the job is started again, and keeps off {', '.join(new)}\n")

    def _patch(self, change: Object, says: str) -> bool:
        """Whether this need not be tried again. `says`: what is shown then."""
        try:
            self.api.patch(change, *rayjobs(self.api), self.name)
        except InfrastructureError:
            return False  # the server is away
        except ApiError as error:
            says = f"the job cannot be moved to other nodes: {error}\n"
        self.write(says.encode())
        return True
