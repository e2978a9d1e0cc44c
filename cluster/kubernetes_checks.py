"""What is wrong with a Kubernetes cluster for a job, found before anything is made on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from ..recipes.errors import UserError
from ..recipes.schema_kubernetes import KubernetesCluster, Volume
from .base import Need
from .kubernetes_api import Api, ApiError, Object
from .kubernetes_job import Job, Manifest, cores_of

PERMISSIONS = (
    ("ray.io", "rayjobs", "", ("create", "get", "list", "watch", "patch", "delete")),
    ("", "secrets", "", ("create", "delete")),
    ("", "pods", "", ("get", "list", "watch", "delete")),
    ("", "pods", "log", ("get",)),
    ("", "events", "", ("list",)),
    ("policy", "poddisruptionbudgets", "", ("create", "delete")),
)
"""(API group, resource, sub-resource, verbs) that a submission takes; k8s/base/rbac.yaml grants the same."""

RAY_GROUP, KUEUE_GROUP = ("apis", "ray.io", "v1"), ("apis", "kueue.x-k8s.io", "v1beta1")
GRANT = "An administrator grants it: k8s/README.md, `ftlaunch-submitter`"


# --- the recipe -------------------------------------------------------------------------------------------------------


def paths(config: KubernetesCluster, need: Need) -> list[str]:
    """Pods see files of this machine nowhere, and a volume's below its mount."""
    found = []
    read = {**need.paths, **need.patterns}
    if need.shared is not None:
        volume = _volume_of(config, need.shared)
        if volume is None:
            found.append(f"{need.shared_setting}: {need.shared} is a folder of this machine; {_REMEDY}")
        elif volume.read_only:
            found.append(f"{need.shared_setting}: {need.shared} is on a volume that is mounted read-only")
    local = {key: path for key, path in read.items() if _volume_of(config, path) is None}
    return [*found, *(f"{key}: {path} is a file of this machine; {_REMEDY}" for key, path in local.items())]


_REMEDY = "the pods do not see it. Name an object store (s3://…), or mount a volume (cluster.volumes) and a path on it."


def _volume_of(config: KubernetesCluster, path: str) -> Volume | None:
    place = PurePosixPath(path)
    return next((volume for volume in config.volumes if PurePosixPath(volume.path) in (place, *place.parents)), None)


# --- the cluster ------------------------------------------------------------------------------------------------------


def cluster(api: Api, job: Job) -> list[str]:
    """Everything about server, namespace and rights. Raises UserError for a login that is refused, and
    InfrastructureError for a server that does not answer."""
    found = _kuberay(api)
    if found:
        return found
    return [*_namespace(api), *permissions(api), *_named(api, job.config), *_queue(api, job.config), *_quota(api, job)]


def _kuberay(api: Api) -> list[str]:
    try:
        api.get(*RAY_GROUP)
    except ApiError as error:
        if error.code == 404:
            return [
                f"cluster.context: {_place(api)} has no KubeRay, which runs the job: helm install kuberay-operator "
                "kuberay/kuberay-operator. k8s/README.md says how."
            ]
        if error.code == 401:
            raise UserError(
                f"cluster.context: {_place(api)} does not accept our login ({error}). Log in again with your "
                "provider's tool; `kubectl get pods` must work."
            ) from error
        if error.code != 403:
            raise
    return []


def _place(api: Api) -> str:
    return f"the cluster of context {api.context}" if api.context else "this cluster"


def _namespace(api: Api) -> list[str]:
    if _is_there(api, "api", "v1", "namespaces", api.namespace):
        return []
    return [f"cluster.namespace: {api.namespace} is not there; `kubectl get namespaces` lists those that are"]


def _is_there(api: Api, *path: str) -> bool:
    """True as well where we may not look."""
    try:
        api.get(*path)
    except ApiError as error:
        if error.code == 404:
            return False
        if error.code != 403:
            raise
    return True


def permissions(api: Api) -> list[str]:
    """What we may not do and would have to, all of it at once."""
    wanted = [(*place, verb) for *place, verbs in PERMISSIONS for verb in verbs]
    with ThreadPoolExecutor(8) as pool:
        allowed = list(pool.map(lambda each: _may(api, *each), wanted))
    denied: dict[str, list[str]] = {}
    for (_, resource, sub, verb), may in zip(wanted, allowed, strict=True):
        if not may:
            denied.setdefault(f"{resource}/{sub}" if sub else resource, []).append(verb)
    if not denied:
        return []
    listed = "; ".join(f"{', '.join(verbs)} {resource}" for resource, verbs in denied.items())
    return [f"cluster.namespace: we may not do this in {api.namespace}: {listed}. {GRANT}."]


def _may(api: Api, group: str, resource: str, sub: str, verb: str) -> bool:
    attributes = {"namespace": api.namespace, "verb": verb, "group": group, "resource": resource, "subresource": sub}
    review: Object = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {key: value for key, value in attributes.items() if value}},
    }
    answer = api.post(review, "apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews")
    return bool(answer["status"]["allowed"])


def _named(api: Api, config: KubernetesCluster) -> list[str]:
    """What the recipe names, as far as we may look. Secrets are not looked at: who may read one may read all."""
    space = ("api", "v1", "namespaces", api.namespace)
    named = [
        *((f"cluster.volumes.{index}.claim", volume.claim, (*space, "persistentvolumeclaims", volume.claim))
          for index, volume in enumerate(config.volumes)),
        *_one("cluster.service_account", config.service_account, (*space, "serviceaccounts")),
        *_one("cluster.priority_class", config.priority_class, ("apis", "scheduling.k8s.io", "v1", "priorityclasses")),
    ]  # fmt: skip
    return [
        f"{key}: {name} is not there; `kubectl get {path[-2]}` lists those that are"
        for key, name, path in named
        if not _is_there(api, *path)
    ]


def _one(key: str, name: str | None, place: tuple[str, ...]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    if name is not None:
        yield key, name, (*place, name)


def _queue(api: Api, config: KubernetesCluster) -> list[str]:
    if config.queue is None:
        return []
    try:
        api.get(*KUEUE_GROUP, "namespaces", api.namespace, "localqueues", config.queue)
    except ApiError as error:
        if error.lacks_kind:
            return [f"cluster.queue: {_place(api)} has no Kueue; leave cluster.queue out, or have it installed"]
        if error.code == 404:
            return [
                f"cluster.queue: {config.queue} is not there; `kubectl get localqueues -n {api.namespace}` lists "
                "those that are"
            ]
        if error.code != 403:
            raise
    return []


def _quota(api: Api, job: Job) -> list[str]:
    """More than a namespace may ever have. What others use at the moment is waited for."""
    try:
        quotas = api.get("api", "v1", "namespaces", api.namespace, "resourcequotas")["items"]
    except ApiError as error:
        if error.code in (403, 404):
            return []
        raise
    wanted = _wanted(job.config)
    return [
        f"cluster: {api.namespace} may have {hard} {name} in all (quota {quota['metadata']['name']}), the job needs "
        f"{wanted[name]:g}. Ask for fewer (--nodes, --gpus-per-node), or have the quota raised."
        for quota in quotas
        for name, hard in ((quota.get("spec") or {}).get("hard") or {}).items()
        if name in wanted and wanted[name] > number(hard)
    ]


def _wanted(config: KubernetesCluster) -> dict[str, float]:
    """By the names that quotas use. The submitting pod is one more."""
    wanted = {"pods": config.nodes + 1.0, "requests.cpu": config.nodes * cores_of(config) + 0.5}
    wanted["cpu"] = wanted["requests.cpu"]
    if config.gpus_per_node:
        wanted[f"requests.{config.gpu_resource}"] = float(config.nodes * config.gpus_per_node)
    if config.memory is not None:
        wanted["requests.memory"] = wanted["memory"] = config.nodes * number(config.memory)
    return wanted


_UNITS: Mapping[str, float] = {
    "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
}  # fmt: skip


def number(quantity: str | int) -> float:
    """`500m` -> 0.5, `64Gi` -> 68719476736."""
    text = str(quantity)
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * _UNITS.get(unit, 1.0)


def dry_run(api: Api, rayjob: Manifest) -> list[str]:
    """What the server and the cluster's own rules say to the job itself. A field that the server does not know is an
    error, not dropped in silence."""
    try:
        api.post(rayjob, *rayjobs(api), dryRun="All", fieldValidation="Strict")
    except ApiError as error:
        return [explain_refusal(error)]
    return []


def rayjobs(api: Api) -> tuple[str, ...]:
    """Where RayJobs are."""
    return (*RAY_GROUP, "namespaces", api.namespace, "rayjobs")


def explain_refusal(error: ApiError) -> str:
    """Why the job was not taken, with a remedy."""
    said = " ".join(str(error).split())
    remedies: Iterable[tuple[bool, str]] = (
        ("unknown field" in said, "KubeRay is too old for it: 1.6 or newer is needed"),
        ("exceeded quota" in said, "Ask for fewer (--nodes, --gpus-per-node), or have the quota raised"),
        (error.code == 403, GRANT),
        (True, "k8s/README.md says what ftlaunch needs of a cluster"),
    )
    return f"cluster: the job is refused: {said.rstrip('.')}. {next(text for fits, text in remedies if fits)}."
