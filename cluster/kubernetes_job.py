"""What makes a run start on a Kubernetes cluster: a RayJob, the Secret that its pods mount, and a budget for
disruptions. Pure.

The Secret holds the driver's orders, our code, and Ray's token; it belongs to the RayJob and goes with it. What runs in
the pods is `pod_agent.py`, which travels in it too: an image has ftlaunch's dependencies and need not have ftlaunch.
"""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..recipes.schema_kubernetes import KubernetesCluster
from . import pod_agent
from .base import Demand
from .ray_settings import QUIET

Manifest = dict[str, Any]

LABEL = "ftlaunch/job"
"""Of everything that belongs to a job; its value is the job's id."""

API_VERSION = "ray.io/v1"
OVERWRITE = {"ray.io/overwrite-container-cmd": "true"}
"""KubeRay leaves our command as it is, and says in KUBERAY_GEN_RAY_START_CMD how Ray is to be started."""

TOKEN = "auth_token"  # noqa: S105 - the key under which KubeRay looks for it
HEAD, WORKER, SUBMITTER = "ray-head", "ray-worker", "ray-job-submitter"
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
KEPT_S = 120
"""Pods of a job that has ended stay so long, for the end of their logs."""

RAY_END_S = 30
"""Of the grace period, what the driver does not get: Ray ends, and the pods do."""

SECRET_BYTES = 1024 * 1024
"""As much as a Secret may hold."""

_NO_TEXT = re.compile(r"[-+.]?[0-9].*|y|yes|n|no|on|off|true|false|null|~|", re.IGNORECASE)

QUEUE = "kueue.x-k8s.io/queue-name"
GANG_QUEUES = {
    "volcano": "volcano.sh/queue-name",
    "yunikorn": "yunikorn.apache.org/queue",
    "kai-scheduler": "kai.scheduler/queue",
}
"""Scheduler -> label by which KubeRay passes its queue on."""


@dataclass(frozen=True)
class Job:
    """One submission. `run` is the run's name, `variables` the names of those that travel, `namespace` where it is."""

    job: str
    run: str
    namespace: str
    config: KubernetesCluster
    variables: Sequence[str]

    @property
    def name(self) -> str:
        """Of the RayJob and what belongs to it: KubeRay allows 47 letters, and adds to them."""
        words = re.sub(r"[^a-z0-9]+", "-", self.run.lower()).strip("-")[:30].strip("-")
        return f"ft-{words}-{self.job}" if words else f"ft-{self.job}"

    @property
    def demand(self) -> Demand:
        """Every pod is a node."""
        config = self.config
        ranks = config.gpus_per_node or config.processes_per_node or 1
        return Demand(
            nodes=config.nodes,
            ranks=ranks * config.nodes,
            uses_gpus=config.gpus_per_node > 0,
            cpus_per_rank=max(1, cores_of(config) // ranks),
        )

    def manifests(self) -> list[Manifest]:
        """All but the Secret, in the order in which they are made."""
        return [self.rayjob(), *([self.budget()] if self.config.pod_disruption_budget else [])]

    # --- the RayJob ---------------------------------------------------------------------------------------------------

    def rayjob(self) -> Manifest:
        """See https://docs.ray.io/en/latest/cluster/kubernetes."""
        config = self.config
        deadlines = {
            "preRunningDeadlineSeconds": config.start_deadline_seconds,
            "activeDeadlineSeconds": config.active_deadline_seconds,
        }
        return {
            "apiVersion": API_VERSION,
            "kind": "RayJob",
            "metadata": self._metadata({**self._labels(), **self._scheduling()}, annotations=OVERWRITE),
            "spec": {
                "entrypoint": f"{config.python} -P {pod_agent.JOB}/agent.py driver",
                "submissionMode": "K8sJobMode",
                "suspend": config.queue is not None,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": KEPT_S,
                "backoffLimit": config.backoff_limit,
                **{name: value for name, value in deadlines.items() if value is not None},
                "submitterPodTemplate": self._submitter(),
                "rayClusterSpec": self._ray_cluster(),
            },
        }

    def _metadata(self, labels: Mapping[str, str], **more: Any) -> Manifest:
        return {"name": self.name, "namespace": self.namespace, "labels": dict(labels), **more}

    def _labels(self) -> dict[str, str]:
        return {**self.config.labels, LABEL: self.job, "app.kubernetes.io/managed-by": "ftlaunch"}

    def _scheduling(self) -> dict[str, str]:
        config = self.config
        labels = {}
        if config.queue is not None:
            labels[QUEUE] = config.queue
        if config.gang_scheduler is not None:
            labels["ray.io/gang-scheduling-enabled"] = "true"
        if config.gang_scheduler in GANG_QUEUES and config.gang_queue is not None:
            labels[GANG_QUEUES[config.gang_scheduler]] = config.gang_queue
        return labels

    def _ray_cluster(self) -> Manifest:
        spec: Manifest = {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token", "secretName": self.name},
            "headGroupSpec": {"rayStartParams": self._ray_start(), "template": self._pod(HEAD)},
        }
        if self.config.nodes > 1:
            count = self.config.nodes - 1
            group = {"groupName": "workers", "replicas": count, "minReplicas": count, "maxReplicas": count}
            spec["workerGroupSpecs"] = [
                {**group, "rayStartParams": self._ray_start(), "template": self._pod(WORKER)},
            ]
        return spec

    def _ray_start(self) -> dict[str, str]:
        """Options of `ray start`, besides those that KubeRay adds. Exactly the ranks of a node fit on it."""
        demand = self.demand
        ranks = demand.ranks // demand.nodes
        return {
            "num-cpus": str(ranks * demand.cpus_per_rank),
            "num-gpus": str(ranks if demand.uses_gpus else 0),
            "object-store-memory": str(2**27),  # nothing of ours lies in it; Ray would take a third of the memory
            "temp-dir": f"{pod_agent.WORK}/r",  # sockets need short paths
            "disable-usage-stats": "true",
        }

    # --- pods ---------------------------------------------------------------------------------------------------------

    def _pod(self, role: str) -> Manifest:
        config = self.config
        return {
            "metadata": {"labels": self._labels(), "annotations": dict(config.annotations)},
            "spec": {
                **self._where(),
                "terminationGracePeriodSeconds": config.termination_grace_period_seconds,
                "containers": [self._container(role)],
                "volumes": [
                    {"name": "job", "secret": self._mounted_secret(role)},
                    {"name": "work", "emptyDir": {}},
                    {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}},
                    *(_claim(index, volume.claim, read_only=volume.read_only)
                      for index, volume in enumerate(config.volumes)),
                ],
            },
        }  # fmt: skip

    def _where(self) -> Manifest:
        """Of any pod: which nodes, whose account, what it may."""
        config = self.config
        may = {"runAsNonRoot": True, "runAsUser": config.run_as_user, "fsGroup": config.fs_group}
        spec = {
            "restartPolicy": "Never",  # KubeRay makes new pods in place of those that end
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "serviceAccountName": config.service_account,
            "priorityClassName": config.priority_class,
            "imagePullSecrets": [{"name": name} for name in config.image_pull_secrets],
            "nodeSelector": dict(config.node_selector),
            "tolerations": [
                {"operator": "Exists" if each.value is None else "Equal", **each.model_dump(exclude_none=True)}
                for each in config.tolerations
            ],
        }
        security = {**{key: value for key, value in may.items() if value is not None},
                    "seccompProfile": {"type": "RuntimeDefault"}}  # fmt: skip
        return {**{key: value for key, value in spec.items() if value not in (None, [], {})},
                "securityContext": security}  # fmt: skip

    def _image(self, role: str) -> Manifest:
        policy = self.config.image_pull_policy
        return {
            "name": role,
            "image": self.config.image,
            **({"imagePullPolicy": policy} if policy else {}),
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "terminationMessagePolicy": "FallbackToLogsOnError",
        }

    def _container(self, role: str) -> Manifest:
        config = self.config
        mounts = [
            {"name": "job", "mountPath": str(pod_agent.JOB), "readOnly": True},
            {"name": "work", "mountPath": str(pod_agent.WORK)},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the place has this name
        ]
        mounts += [
            {"name": f"volume-{index}", "mountPath": volume.path, "readOnly": volume.read_only}
            for index, volume in enumerate(config.volumes)
        ]
        made = {
            **self._image(role),
            "command": [config.python, "-P", f"{pod_agent.JOB}/agent.py", "node"],
            "ports": [{"name": name, "containerPort": port} for name, port in PORTS.items() if role == HEAD],
            "env": self._environment(),
            "envFrom": [{"secretRef": {"name": name}} for name in config.env_from_secrets],
            "resources": _resources(config),
            "volumeMounts": mounts,
        }
        return {key: value for key, value in made.items() if value != []}

    def _environment(self) -> list[Manifest]:
        settings = {
            **QUIET,
            "RAY_AUTH_MODE": "token",
            # Ray's job server would kill what has not ended within 3 s of being told to.
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.config.termination_grace_period_seconds - RAY_END_S),
        }
        return [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            *({"name": name, "value": value} for name, value in settings.items()),
            {"name": "RAY_AUTH_TOKEN", "valueFrom": self._from_secret(TOKEN)},
            *({"name": name, "valueFrom": self._from_secret(env_key(name))} for name in self.variables),
        ]

    def _from_secret(self, key: str) -> Manifest:
        return {"secretKeyRef": {"name": self.name, "key": key}}

    def _mounted_secret(self, role: str) -> Manifest:
        """Only the head is told what the driver is: there may be secrets in it."""
        keys = ["agent.py", "agent.json", "package.tar.xz", *(["driver.json"] if role == HEAD else [])]
        return {
            "secretName": self.name,
            "defaultMode": 0o440 if self.config.fs_group is not None else 0o444,
            "items": [{"key": key, "path": key} for key in keys],
        }

    def _submitter(self) -> Manifest:
        """The pod that asks Ray's job server to run the entrypoint; KubeRay adds its command and the token."""
        resources = {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}}
        return {
            "metadata": {"labels": self._labels(), "annotations": dict(self.config.annotations)},
            "spec": {**self._where(), "containers": [{**self._image(SUBMITTER), "resources": resources}]},
        }

    # --- what goes with it --------------------------------------------------------------------------------------------

    def budget(self) -> Manifest:
        """Pods that a drain may not evict while the run needs them."""
        return {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": self._metadata(self._labels()),
            "spec": {
                "minAvailable": self.config.nodes,
                "selector": {"matchLabels": {LABEL: self.job, "ray.io/is-ray-node": "yes"}},
            },
        }

    def secret(self, content: Mapping[str, bytes]) -> Manifest:
        """Of this content."""
        data = {key: base64.b64encode(value).decode() for key, value in content.items()}
        return {**self._secret_head(), "data": data}

    def secret_unseen(self) -> Manifest:
        """What `secret` is like, for people."""
        said = {
            "agent.py": "(ftlaunch/cluster/pod_agent.py)", "agent.json": "(what the pods need and start)",
            "package.tar.xz": "(ftlaunch's code)", "driver.json": "(the recipe)", TOKEN: "(new for every run)",
            **{env_key(name): f"(${name})" for name in self.variables},
        }  # fmt: skip
        return {**self._secret_head(), "stringData": said}

    def _secret_head(self) -> Manifest:
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": self._metadata(self._labels()),
            "type": "Opaque",
            "immutable": True,
        }


def cores_of(config: KubernetesCluster) -> int:
    """That a pod requests."""
    if config.cpus_per_node is not None:
        return config.cpus_per_node
    return 8 * config.gpus_per_node or config.processes_per_node or 1


def _resources(config: KubernetesCluster) -> Manifest:
    """No limit of processor time: it would slow ranks down without freeing anything for others."""
    memory = {} if config.memory is None else {"memory": config.memory}
    gpus = {config.gpu_resource: str(config.gpus_per_node)} if config.gpus_per_node else {}
    more = {name: str(amount) for name, amount in config.resources.items()}
    limits = {**memory, **gpus, **more}
    requests = {"cpu": str(cores_of(config)), **limits}
    return {"requests": requests, **({"limits": limits} if limits else {})}


def _claim(index: int, claim: str, *, read_only: bool) -> Manifest:
    return {"name": f"volume-{index}", "persistentVolumeClaim": {"claimName": claim, "readOnly": read_only}}


def env_key(name: str) -> str:
    """A variable's key in the Secret."""
    return f"env.{name}"


def secret_content(
    job: Job, entry: str, folder: str, needs: Sequence[str], driver: Mapping[str, Any], code: Path,
    token: str, variables: Mapping[str, str],
) -> dict[str, bytes]:  # fmt: skip
    """What the Secret holds; `code` is the folder that a `CodeFolder` makes."""
    agent = {"job": job.job, "entry": entry, "folder": folder, "needs": list(needs)}
    return {
        "agent.py": Path(pod_agent.__file__).read_bytes(),
        "agent.json": json.dumps(agent).encode(),
        "package.tar.xz": packed(code),
        "driver.json": json.dumps(driver).encode(),
        TOKEN: token.encode(),
        **{env_key(name): value.encode() for name, value in variables.items()},
    }


def packed(folder: Path) -> bytes:
    """A folder's files, by their path from its parent; the same files give the same bytes."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:xz") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(entry, file)
    return made.getvalue()


def as_yaml(manifests: Sequence[Manifest]) -> str:
    """Manifests as kubectl takes them."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 160
    made = io.StringIO()
    yaml.dump_all([_quoted(manifest) for manifest in manifests], made)
    return made.getvalue()


def _quoted(value: Any) -> Any:
    """With quotes around texts that Kubernetes, which reads YAML 1.1, would take for something else."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if isinstance(value, dict):
        return {key: _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and _NO_TEXT.fullmatch(value) else value
