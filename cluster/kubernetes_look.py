"""What a Kubernetes cluster says of a job, besides its RayJob and its pods: events, and the queue's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..recipes.errors import InfrastructureError
from . import kubernetes_causes
from .kubernetes_api import Api, ApiError, Object
from .kubernetes_causes import Cause
from .kubernetes_checks import KUEUE_GROUP, rayjobs
from .kubernetes_job import LABEL, SUBMITTER

TERMINAL = ("Complete", "Failed", "ValidationFailed")
ASKED_PODS = 3
"""So many pods are asked for events: what is wrong with one is wrong with the others."""


@dataclass(frozen=True)
class Place:
    """Where a job is. `nodes`: pods that it has when it runs."""

    name: str
    job: str
    nodes: int


def selector_of(place: Place) -> str:
    """Of the job's pods."""
    return f"{LABEL}={place.job}"


def late_pods(pods: Iterable[Object]) -> list[Object]:
    """Those that do not run."""
    return [pod for pod in pods if not kubernetes_causes.has_started(pod) or kubernetes_causes.ended(pod)]


def events(api: Api, place: Place, rayjob: Object, pods: Iterable[Object]) -> list[Object]:
    """Of what is not there yet: events of what is are history."""
    pods = list(pods)
    names = [pod["metadata"]["name"] for pod in late_pods(pods)[:ASKED_PODS]]
    nodes = [pod for pod in pods if pod["spec"]["containers"][0]["name"] != SUBMITTER]
    if len(nodes) < place.nodes:
        cluster = (rayjob.get("status") or {}).get("rayClusterName")
        names += [place.name, *([cluster] if cluster else [])]
    path = ("api", "v1", "namespaces", api.namespace, "events")
    return [event for name in names for event in _list(api, *path, fieldSelector=f"involvedObject.name={name}")]


def workloads(api: Api, rayjob: Object) -> list[Object]:
    """Kueue's, while it holds the job back."""
    if not (rayjob.get("spec") or {}).get("suspend"):
        return []
    selector = f"kueue.x-k8s.io/job-uid={rayjob['metadata']['uid']}"
    return _list(api, *KUEUE_GROUP, "namespaces", api.namespace, "workloads", labelSelector=selector)


def _list(api: Api, *path: str, **query: str) -> list[Object]:
    """Empty where it is not ours to see."""
    try:
        items: list[Object] = api.get(*path, **query)["items"]
    except (ApiError, InfrastructureError):
        return []
    return items


def standing(api: Api, place: Place) -> str | None:
    """How the job stands, in words that go behind its name; None: it is over. Raises ApiError, InfrastructureError."""
    try:
        rayjob = api.get(*rayjobs(api), place.name)
    except ApiError as error:
        if error.code != 404:
            raise
        return None
    if (rayjob.get("status") or {}).get("jobDeploymentStatus") in TERMINAL:
        return None
    pods = api.get("api", "v1", "namespaces", api.namespace, "pods", labelSelector=selector_of(place))["items"]
    found = kubernetes_causes.causes(rayjob, late_pods(pods), events(api, place, rayjob, pods), workloads(api, rayjob))
    return _in_words(found, pods, place)


def _in_words(found: Iterable[Cause], pods: Iterable[Mapping[str, object]], place: Place) -> str:
    waits = "; ".join(cause.text for cause in found)
    return f"waits: {waits}" if waits else f"has its pods: {kubernetes_causes.counted(pods, place.nodes)}"
