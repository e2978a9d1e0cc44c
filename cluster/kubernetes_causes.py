"""Why a job on Kubernetes does not run yet, or no more: what its RayJob, pods, events and Kueue's workload say, in
words and with a remedy. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .kubernetes_job import HEAD
from .pod_agent import UNFIT

Object = Mapping[str, Any]

ADMIN = "k8s/README.md says what an administrator sets up"


@dataclass(frozen=True)
class Cause:
    """`hopeless`: waiting does not help, somebody has to mend something."""

    text: str
    remedy: str
    hopeless: bool = False

    def __str__(self) -> str:
        return f"{self.text}. {self.remedy}"


WAITING: dict[str, str] = {
    "ErrImagePull": "pull",
    "ImagePullBackOff": "pull",
    "ErrImageNeverPull": "Set cluster.image_pull_policy to IfNotPresent, or load the image onto the nodes",
    "InvalidImageName": "Mend cluster.image",
    "CreateContainerConfigError": "Make what is missing in the namespace, or take its name out of the recipe",
    "CreateContainerError": "Look at the image's users and paths: k8s/Dockerfile makes one that works",
    "RunContainerError": "Look at cluster.python and the image: k8s/Dockerfile makes one that works",
}
"""Reason for which a container waits -> remedy. Those that come and go within a second are not here."""

PULL = (
    (r"not found|manifest unknown|does not exist", "Mend cluster.image: there is no such image or tag"),
    (
        r"unauthorized|denied|authentication|forbidden|401|403",
        "The registry wants a login: name its Secret in cluster.image_pull_secrets "
        "(kubectl create secret docker-registry …)",
    ),
    (r"", "Look whether the nodes reach the registry, and at cluster.image"),
)
"""What a failed pull says -> remedy."""

UNSCHEDULABLE = (
    (r"Insufficient (?P<what>[\w./-]+)", "Ask for fewer (--nodes, --gpus-per-node, cluster.cpus_per_node, "
     "cluster.memory), wait until others end, or let nodes be added"),
    (r"untolerated taint|had taint", "Name the taint in cluster.tolerations"),
    (r"didn't match .*(selector|affinity)", "Mend cluster.node_selector: `kubectl get nodes --show-labels`"),
    (r"persistentvolumeclaim|volume", "Look at the claims of cluster.volumes: `kubectl describe pvc`"),
    (r"", "`kubectl describe pod` says more"),
)  # fmt: skip
"""What the scheduler says -> remedy."""

REFUSED = (
    (r"exceeded quota", "The namespace's quota is used up: ask for fewer (--nodes, --gpus-per-node), wait until others "
     "end, or have it raised (`kubectl describe quota`)", False),
    (r"must specify", "The namespace's quota wants it said: set cluster.memory and cluster.cpus_per_node", True),
    (r"violates PodSecurity", f"The namespace allows less than the pods want; {ADMIN}", True),
    (r"no PriorityClass", "Mend cluster.priority_class: `kubectl get priorityclasses`", True),
    (r"serviceaccount|service account", "Mend cluster.service_account: `kubectl get serviceaccounts`", True),
    (r"forbidden|admission webhook|denied", f"A rule of the cluster forbids it; {ADMIN}", True),
)  # fmt: skip
"""Why KubeRay could not make a pod -> remedy, and whether it is hopeless."""

VOLUMES = (
    (r"Multi-Attach", "A volume that one node mounts at a time cannot be shared: take one with ReadWriteMany", True),
    (r"not found", "Make what is missing in the namespace, or take its name out of the recipe", True),
    (r"", "`kubectl describe pod` says more", False),
)
"""Why a volume is not mounted -> remedy, and whether it is hopeless."""

FAILED = {
    "PreRunningDeadlineExceeded": "Its pods were not up within cluster.start_deadline_seconds",
    "DeadlineExceeded": "It took longer than cluster.active_deadline_seconds",
    "SubmissionFailed": "The driver could not be handed to Ray",
    "JobStatusCheckTimeoutExceeded": "Ray's head did not answer KubeRay any more",
}
"""KubeRay's reason -> what it means."""


def causes(
    rayjob: Object, pods: Iterable[Object], events: Iterable[Object], workloads: Iterable[Object]
) -> list[Cause]:
    """All that keeps a job from running, each once."""
    found = [*_of_rayjob(rayjob), *_of_workloads(rayjob, workloads), *_of_events(events)]
    for pod in pods:
        found += _of_pod(pod)
    return list(dict.fromkeys(found))


def _of_rayjob(rayjob: Object) -> Iterator[Cause]:
    status = rayjob.get("status") or {}
    if status.get("jobDeploymentStatus") == "ValidationFailed":
        remedy = f"KubeRay is older or stricter than what ftlaunch is made for; {ADMIN}"
        yield Cause(f"KubeRay refuses the job: {status.get('message', '')}".rstrip("."), remedy, hopeless=True)


def _of_workloads(rayjob: Object, workloads: Iterable[Object]) -> Iterator[Cause]:
    """What Kueue says while it holds a job back."""
    if not (rayjob.get("spec") or {}).get("suspend"):
        return
    queue = (rayjob["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name")
    if queue is None:
        return
    said = [
        condition["message"]
        for workload in workloads
        for condition in (workload.get("status") or {}).get("conditions", [])
        if condition["type"] == "QuotaReserved" and condition["status"] == "False" and condition.get("message")
    ]
    yield Cause(
        f"it waits in queue {queue}" + "".join(f": {_line(text)}" for text in said[:1]),
        f"`kubectl get workloads` shows the queue; a smaller job ({'--nodes, --gpus-per-node'}) may fit in before",
    )


def _of_events(events: Iterable[Object]) -> Iterator[Cause]:
    for event in events:
        message, reason = _line(event.get("message") or ""), event.get("reason")
        if reason in ("FailedToCreateHeadPod", "FailedToCreateWorkerPod", "FailedToCreateRayJobSubmitter",
                      "FailedCreate"):  # fmt: skip
            yield from _refused(message)
        elif reason in ("FailedMount", "FailedAttachVolume"):
            remedy, hopeless = next((r, h) for pattern, r, h in VOLUMES if re.search(pattern, message, re.IGNORECASE))
            yield Cause(f"a volume is not mounted: {message}", remedy, hopeless)


def _refused(message: str) -> Iterator[Cause]:
    said = re.sub(r"^.*?(?=pods? \"|exceeded quota|error looking up|no PriorityClass)", "", message)
    said = re.sub(r'pods "[^"]*" is forbidden: ', "", said)
    for pattern, remedy, hopeless in REFUSED:
        if re.search(pattern, message, re.IGNORECASE):
            yield Cause(f"a pod is refused: {said}", remedy, hopeless)
            return
    yield Cause(f"a pod could not be made: {said}", "`kubectl describe raycluster` says more")


def _of_pod(pod: Object) -> Iterator[Cause]:
    status = pod.get("status") or {}
    if (end := ended(pod)) is not None:
        yield Cause(end, "KubeRay makes another one in its place")
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            message = _line(condition.get("message") or condition.get("reason") or "no word")
            found = next(remedy for pattern, remedy in UNSCHEDULABLE if re.search(pattern, message))
            yield Cause(f"a pod finds no node: {message}", found)
    for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if (remedy := WAITING.get(waiting.get("reason", ""))) is not None:
            yield _waiting(container, waiting, remedy)


def _waiting(container: Object, waiting: Object, remedy: str) -> Cause:
    message = _line(waiting.get("message") or waiting["reason"])
    if remedy != "pull":
        return Cause(f"a container cannot start: {waiting['reason']}: {message}", remedy, hopeless=True)
    # While it waits to pull again, it does not say any more what was wrong; the cause is the same, so its text is.
    found = next(remedy for pattern, remedy in PULL if re.search(pattern, message, re.IGNORECASE))
    return Cause(f"image {container['image']} cannot be pulled", found, hopeless=True)


def unfit(pod: Object) -> str | None:
    """What the image lacks, where a pod has ended for that."""
    states = [state for state in _terminated(pod) if state["exitCode"] == UNFIT]
    return _last_line(states[0].get("message") or "its image cannot run ftlaunch") if states else None


def _terminated(pod: Object) -> list[Object]:
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return [each["state"]["terminated"] for each in statuses if (each.get("state") or {}).get("terminated")]


def ended(pod: Object) -> str | None:
    """How a pod's container has ended, in words; None: it has not."""
    status = pod.get("status") or {}
    for state in _terminated(pod):
        if not _is_submitter(pod):
            killed = state.get("reason") == "OOMKilled"
            said = " (its memory was used up: raise cluster.memory)" if killed else ""
            message = f": {last}" if (last := _last_line(state.get("message") or "")) and not killed else ""
            return f"{pod['metadata']['name']} has ended with exit code {state['exitCode']}{said}{message}"
    if status.get("reason"):  # Evicted, NodeLost, Preempting
        return f"{pod['metadata']['name']} is gone: {status['reason']}: {_line(status.get('message') or '')}"
    return None


def failed(rayjob: Object) -> str | None:
    """Why KubeRay has given a job up; None: it has not."""
    status = rayjob.get("status") or {}
    if status.get("jobDeploymentStatus") not in ("Failed", "ValidationFailed"):
        return None
    reason = status.get("reason") or "no reason given"
    return f"{FAILED.get(reason, reason)}: {_line(status.get('message') or 'no word')}"


def head_of(pods: Iterable[Object]) -> Object | None:
    """The newest pod with Ray's head."""
    heads = [pod for pod in pods if any(each["name"] == HEAD for each in pod["spec"]["containers"])]
    return max(heads, key=lambda pod: str(pod["metadata"].get("creationTimestamp") or ""), default=None)


def has_started(pod: Object) -> bool:
    """Whether its container runs or has run: then there is a log."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return any(set(each.get("state") or {}) & {"running", "terminated"} for each in statuses)


def counted(pods: Iterable[Object], nodes: int) -> str:
    """How many of the nodes are there."""
    nodes_there = [pod for pod in pods if not _is_submitter(pod) and has_started(pod) and ended(pod) is None]
    return f"{len(nodes_there)} of {nodes} pods run"


def _is_submitter(pod: Object) -> bool:
    return "ray.io/node-type" not in (pod["metadata"].get("labels") or {})


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
