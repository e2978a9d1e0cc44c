"""Plays KubeRay's operator, the scheduler and the kubelets for `kube_api.py`: it makes the pods of a RayJob, starts
their containers' commands as processes on namespace hosts, with the environment, Secrets and volumes that the manifests
say, runs the entrypoint as Ray's job server does, and ends everything as Kubernetes would.

What it adds to a pod is what KubeRay 1.7 does (ray-operator/controllers/ray/common/pod.go): the `ray start` command
from rayStartParams, FQ_RAY_IP on workers, RAY_PORT, RAY_ADDRESS. Each container is the first process of process and
mount namespaces of its own, in its host's network. Ray's job server itself is not started (it needs `ray[default]`):
the entrypoint is run here, with a shell, and is told to end as that one tells it.
"""

from __future__ import annotations

import base64
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from kube_api import Kube, Object, Refused, Served, kube_api
from processes import BIN
from ssh_hosts import Host, Hosts

POLL_S = 0.1
FINALIZER = "ray.io/rayjob-finalizer"
UNIT = """
set -e
mount -t tmpfs none /mnt
mkdir -p /mnt/ftlaunch
cp -r "$1" /mnt/ftlaunch/job
mkdir /mnt/ftlaunch/work /mnt/full
mount -t tmpfs -o size=64m none /mnt/full
mount -t tmpfs none /dev/shm
shift
exec "$@"
"""
"""Mounts, and then the container's command as the first process."""


@dataclass
class Container:
    """A pod's container, as processes on a host."""

    pod: str
    host: Host
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    told_s: float | None = None
    """When it was asked to end."""

    @property
    def first(self) -> psutil.Process | None:
        """Its first process, which is the only child of `unshare`."""
        with suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children()
            return children[0] if children else None
        return None

    def signal(self, number: int) -> None:
        with suppress(psutil.Error):
            if (first := self.first) is not None:
                first.send_signal(number)


@dataclass
class Operator:
    """All of it for one namespace. `fail`: pod name's part -> status in place of a container that starts; `full`: hosts
    whose disk is."""

    kube: Kube
    hosts: Hosts
    folder: Path
    fail: dict[str, Object] = field(default_factory=dict)
    full: set[str] = field(default_factory=set)
    containers: dict[str, Container] = field(default_factory=dict)
    """Of pods that are there."""
    ended: list[int] = field(default_factory=list)
    """Exit codes of pods that are gone."""
    _entrypoints: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _closed: threading.Event = field(default_factory=threading.Event)
    errors: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                self.step()
            except Refused:
                continue  # deleted meanwhile
            except BaseException as error:
                self.errors.append(error)
                return

    def step(self) -> None:
        for rayjob in self.kube.all("rayjobs"):
            self.reconcile(rayjob)
        for pod in self.kube.all("pods"):
            self.look_after(pod)

    # --- KubeRay ------------------------------------------------------------------------------------------------------

    def reconcile(self, rayjob: Object) -> None:
        name, status = rayjob["metadata"]["name"], rayjob.get("status", {})
        if "deletionTimestamp" in rayjob["metadata"]:
            self.stop_entrypoint(name)
            self.kube.update("rayjobs", name, {"metadata": {"finalizers": None}})
            return
        if rayjob["spec"]["suspend"]:
            if status.get("jobDeploymentStatus") not in ("Suspended", None):
                self.suspend(name)
            elif not status:
                self.kube.update("rayjobs", name, {"status": {"jobDeploymentStatus": "Suspended"}})
            return
        deployment = status.get("jobDeploymentStatus")
        if deployment in (None, "Suspended", "Retrying"):
            if not self.pods_of(rayjob):
                self.begin(rayjob)
        elif deployment == "Initializing":
            self.submit_when_ready(rayjob)
        elif deployment == "Running":
            self.replace_workers(rayjob)
            self.look_at_entrypoint(rayjob)

    def begin(self, rayjob: Object) -> None:
        name = rayjob["metadata"]["name"]
        cluster = f"{name}-{self.kube.version}"
        self.kube.update("rayjobs", name, {"metadata": {"finalizers": [FINALIZER]}, "status": {
            "jobDeploymentStatus": "Initializing", "rayClusterName": cluster}})  # fmt: skip
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": rayjob["metadata"]["uid"]}
        body = {
            "apiVersion": "ray.io/v1", "kind": "RayCluster", "spec": rayjob["spec"]["rayClusterSpec"],
            "metadata": {"name": cluster, "ownerReferences": [owner], "labels": rayjob["metadata"]["labels"]},
        }  # fmt: skip
        made = self.kube.create("rayclusters", body)
        for number, (role, group) in enumerate(groups_of(made)):
            self.make_pod(made, number, role, group)

    def make_pod(self, cluster: Object, number: int, role: str, group: Object) -> None:
        name = f"{cluster['metadata']['name']}-{role}-{number}"
        template = group["template"]
        owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": cluster["metadata"]["name"],
                 "uid": cluster["metadata"]["uid"]}  # fmt: skip
        labels = {**template["metadata"]["labels"], "ray.io/is-ray-node": "yes", "ray.io/node-type": role,
                  "ray.io/cluster": cluster["metadata"]["name"]}  # fmt: skip
        body = {
            "apiVersion": "v1", "kind": "Pod", "spec": template["spec"],
            "metadata": {"name": name, "labels": labels, "ownerReferences": [owner], "finalizers": ["test/kubelet"]},
        }  # fmt: skip
        self.kube.create("pods", body)

    def submit_when_ready(self, rayjob: Object) -> None:
        """KubeRay waits for all pods to be ready, here for Ray's head to answer."""
        name = rayjob["metadata"]["name"]
        pods = self.pods_of(rayjob)
        running = [self.containers[pod] for pod in pods if pod in self.containers]
        nodes = 1 + sum(each["replicas"] for each in rayjob["spec"]["rayClusterSpec"].get("workerGroupSpecs", []))
        if len(running) < nodes or not answers(running[0].host.address, 6379):
            return
        head = running[0]
        first = head.first
        assert first is not None
        inside = ["nsenter", f"--target={first.pid}", "--net", "--mount", "--uts", "--ipc", "--pid"]
        with (self.folder / f"{name}.entrypoint").open("ab") as log:
            self._entrypoints[name] = subprocess.Popen(
                [*inside, "sh", "-c", rayjob["spec"]["entrypoint"]], env=head.environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
            )  # fmt: skip
        self.kube.update("rayjobs", name, {"status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}})

    def look_at_entrypoint(self, rayjob: Object) -> None:
        name = rayjob["metadata"]["name"]
        code = self._entrypoints[name].poll()
        if code is None:
            return
        done = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
        failed = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed",
                  "message": f"Job entrypoint command failed with exit code {code}"}  # fmt: skip
        count = rayjob["status"].get("failed", 0)
        if code and count < rayjob["spec"]["backoffLimit"]:
            failed = {"jobDeploymentStatus": "Retrying", "failed": count + 1}
            self.kube.delete("rayclusters", rayjob["status"]["rayClusterName"])
        self.kube.update("rayjobs", name, {"status": failed if code else done})

    def replace_workers(self, rayjob: Object) -> None:
        """A worker that has ended is deleted, and another one made in its place."""
        cluster = self.kube.get("rayclusters", rayjob["status"]["rayClusterName"])
        there = {name.rpartition("-")[2]: name for name in self.pods_of(rayjob)}
        for number, (role, group) in enumerate(groups_of(cluster)):
            name = there.get(str(number))
            if name is None:
                self.make_pod(cluster, number, role, group)
            elif role == "worker" and self.kube.get("pods", name).get("status", {}).get("phase") == "Failed":
                self.kube.delete("pods", name)

    def suspend(self, name: str) -> None:
        """KubeRay deletes the cluster, and waits for its pods."""
        rayjob = self.kube.get("rayjobs", name)
        with suppress(Refused):
            self.kube.delete("rayclusters", rayjob["status"]["rayClusterName"])
        if not self.pods_of(rayjob):
            self.kube.update("rayjobs", name, {"status": {"jobDeploymentStatus": "Suspended"}})

    def stop_entrypoint(self, name: str) -> None:
        """As Ray's job server: to the shell and all its descendants."""
        entrypoint = self._entrypoints.pop(name, None)
        if entrypoint is None or entrypoint.poll() is not None:
            return
        with suppress(psutil.Error):
            for process in [*psutil.Process(entrypoint.pid).children(recursive=True)]:
                process.send_signal(signal.SIGTERM)

    def pods_of(self, rayjob: Object) -> list[str]:
        cluster = rayjob.get("status", {}).get("rayClusterName", "none")
        pods = [pod for pod in self.kube.all("pods") if pod["metadata"]["labels"].get("ray.io/cluster") == cluster]
        return sorted((pod["metadata"]["name"] for pod in pods), key=lambda name: int(name.rpartition("-")[2]))

    # --- kubelets -----------------------------------------------------------------------------------------------------

    def look_after(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        container = self.containers.get(name)
        if "deletionTimestamp" in pod["metadata"]:
            self.end(pod, container)
        elif container is None and "status" not in pod:
            failure = next((status for part, status in self.fail.items() if part in name), None)
            if failure is not None:
                self.kube.update("pods", name, {"status": failure})
            else:
                self.start(pod)
        elif container is not None and container.process.poll() is not None and "running" in str(pod.get("status")):
            said = self.kube.logs[name].read_text()[-2048:]  # FallbackToLogsOnError
            self.kube.update("pods", name, {"status": ended_status(container.process.returncode, said)})

    def start(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        number = int(name.rpartition("-")[2])
        hosts = [host for host in self.hosts.members.values() if host.name not in kept_off(pod)]
        host, head = hosts[number], hosts[0].address
        spec = pod["spec"]["containers"][0]
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        secret = volumes["job"]["secret"]
        found = self.kube.get("secrets", secret["secretName"])
        place = self.folder / f"{name}-{self.kube.version}"
        place.mkdir()
        for item in secret["items"]:
            file = place / item["path"]
            file.write_bytes(base64.b64decode(found["data"][item["key"]]))
            file.chmod(secret["defaultMode"])
        for mount in spec["volumeMounts"]:
            if mount["name"].startswith("volume-"):
                assert Path(mount["mountPath"]).is_dir(), "what is claimed lies there on all hosts"
        cluster = self.kube.get("rayclusters", pod["metadata"]["labels"]["ray.io/cluster"])
        environment = self.environment(spec, host.address, dict(groups_of(cluster))[role_of(pod)], head, role_of(pod))
        if host.name in self.full:
            environment["TMPDIR"] = "/mnt/full"
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["nsenter", f"--target={host.init}", "--net", "--uts", "--ipc", "--",
                 "unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL",
                 "sh", "-c", UNIT, "unit", str(place), *spec["command"]],
                env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self.containers[name] = Container(name, host, environment, process)
        self.kube.logs[name] = log
        status = {"phase": "Running", "podIP": host.address, "containerStatuses": [
            {"name": spec["name"], "image": spec["image"], "state": {"running": {}}}]}  # fmt: skip
        self.kube.update("pods", name, {"spec": {"nodeName": host.name}, "status": status})

    def environment(self, spec: Object, address: str, group: Object, head: str, role: str) -> dict[str, str]:
        """Of a container: the manifest's, and what KubeRay adds."""
        params = {**group["rayStartParams"], "metrics-export-port": "8080", "block": "true",
                  "dashboard-agent-listen-port": "52365"}  # fmt: skip
        params |= {"dashboard-host": "0.0.0.0"} if role == "head" else {"address": f"{head}:6379"}
        flags = " ".join(flag(key, params[key]) for key in sorted(params) if params[key] != "false")
        start = f"ray start {'--head ' if role == 'head' else ''}{flags}"
        found = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.folder), "LANG": "C.UTF-8"}
        found |= {each["name"]: self.value(each, address) for each in spec["env"]}
        for source in spec.get("envFrom", []):
            secret = self.kube.get("secrets", source["secretRef"]["name"])
            found |= {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
        place = "127.0.0.1" if role == "head" else head
        found |= {"RAY_PORT": "6379", "RAY_ADDRESS": f"{place}:6379", "KUBERAY_GEN_RAY_START_CMD": start}
        return found | ({} if role == "head" else {"FQ_RAY_IP": head})

    def value(self, variable: Object, address: str) -> str:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "status.podIP"
            return address
        secret = self.kube.get("secrets", source["secretKeyRef"]["name"])
        return base64.b64decode(secret["data"][source["secretKeyRef"]["key"]]).decode()

    def end(self, pod: Object, container: Container | None) -> None:
        """SIGTERM, the grace period, SIGKILL; then the pod is gone."""
        name = pod["metadata"]["name"]
        grace_s = pod["metadata"].get("deletionGracePeriodSeconds", pod["spec"]["terminationGracePeriodSeconds"])
        if container is not None and container.process.poll() is None:
            if container.told_s is None:
                container.told_s = time.monotonic()
                container.signal(signal.SIGTERM)
            elif time.monotonic() - container.told_s > grace_s:
                container.process.kill()
            return
        if container is not None:
            self.ended.append(container.process.returncode)
            del self.containers[name]
        self.kube.update("pods", name, {"metadata": {"finalizers": None}})
        self.kube.logs.pop(name, None)

    def close(self) -> None:
        """Power off."""
        self._closed.set()
        for container in self.containers.values():
            container.process.kill()
            container.process.wait()
        for entrypoint in self._entrypoints.values():
            entrypoint.kill()
            entrypoint.wait()


def groups_of(cluster: Object) -> Iterator[tuple[str, Object]]:
    """(role, group) of every pod, the head first."""
    yield "head", cluster["spec"]["headGroupSpec"]
    for group in cluster["spec"].get("workerGroupSpecs", []):
        yield from (("worker", group) for _ in range(group["replicas"]))


def role_of(pod: Object) -> str:
    """`head` or `worker`."""
    role: str = pod["metadata"]["labels"]["ray.io/node-type"]
    return role


def kept_off(pod: Object) -> list[str]:
    """Nodes that its affinity excludes."""
    affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    expressions = [each for term in terms for each in term["matchExpressions"]]
    assert all((each["key"], each["operator"]) == ("kubernetes.io/hostname", "NotIn") for each in expressions)
    return [name for each in expressions for name in each["values"]]


def flag(name: str, value: str) -> str:
    """As KubeRay's convertParamMap."""
    return f"--{name}" if value == "true" else f"--{name}={value}"


def ended_status(code: int, said: str) -> Object:
    """Of a pod whose container has ended."""
    shown = {"reason": "Completed"} if code == 0 else {"reason": "Error", "message": said}
    state = {"terminated": {"exitCode": code if code >= 0 else 128 - code, **shown}}
    return {"phase": "Succeeded" if code == 0 else "Failed", "containerStatuses": [
        {"name": "ray-head", "image": "test", "state": state}]}  # fmt: skip


def answers(address: str, port: int) -> bool:
    """Whether something listens there."""
    import socket

    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((address, port)) == 0


@contextmanager
def operator(kube: Kube, hosts: Hosts, folder: Path, **settings: Any) -> Iterator[Operator]:
    """One that works until the end; what went wrong in it fails the test."""
    played = Operator(kube, hosts, folder, **settings)
    thread = threading.Thread(target=played.run, daemon=True)
    thread.start()
    try:
        yield played
    finally:
        played.close()
        thread.join(10)
        if played.errors:
            raise played.errors[0]


@contextmanager
def kubernetes_on(hosts: Hosts, folder: Path, place: Path) -> Iterator[tuple[Served, Operator]]:
    """A cluster whose nodes are hosts, with a claim `shared` for a folder that they all see."""
    with kube_api(folder) as served, operator(served.kube, hosts, folder) as played:
        body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "shared"},
                "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}}  # fmt: skip
        served.kube.create("persistentvolumeclaims", body)
        assert place.is_dir()
        yield served, played
