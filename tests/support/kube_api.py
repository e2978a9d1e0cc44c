"""A Kubernetes API server on loopback: it stores objects, validates them against the real schemas, keeps owners and
finalizers, streams watches and logs, and refuses in the words of the real one. Nothing runs on it by itself: who plays
the operator and the kubelets is in `kube_operator.py`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import jsonschema
import pytest
import yaml

Object = dict[str, Any]

CRDS = "FTLAUNCH_KUBERAY_CRDS"
TOKEN = "a-login"
USER = "ann"
SECRET_BYTES = 1024 * 1024

KINDS = {
    "rayjobs": ("ray.io", "v1", "RayJob"),
    "rayclusters": ("ray.io", "v1", "RayCluster"),
    "secrets": ("", "v1", "Secret"),
    "pods": ("", "v1", "Pod"),
    "events": ("", "v1", "Event"),
    "namespaces": ("", "v1", "Namespace"),
    "resourcequotas": ("", "v1", "ResourceQuota"),
    "persistentvolumeclaims": ("", "v1", "PersistentVolumeClaim"),
    "serviceaccounts": ("", "v1", "ServiceAccount"),
    "poddisruptionbudgets": ("policy", "v1", "PodDisruptionBudget"),
    "priorityclasses": ("scheduling.k8s.io", "v1", "PriorityClass"),
    "localqueues": ("kueue.x-k8s.io", "v1beta1", "LocalQueue"),
    "workloads": ("kueue.x-k8s.io", "v1beta1", "Workload"),
    "selfsubjectaccessreviews": ("authorization.k8s.io", "v1", "SelfSubjectAccessReview"),
}
VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "GET": "get"}


class Refused(Exception):
    """An answer that is a `Status`."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "details": details, "code": code,
        }  # fmt: skip


def qualified(plural: str) -> str:
    """`rayjobs.ray.io`, `pods`."""
    group = KINDS[plural][0]
    return f"{plural}.{group}" if group else plural


# --- schemas ----------------------------------------------------------------------------------------------------------


def crd_folder() -> Path:
    """Where KubeRay's own schemas lie. Skips where they are not there."""
    folder = os.environ.get(CRDS)
    if not folder or not Path(folder).is_dir():
        pytest.skip(
            f"{CRDS} names no folder with KubeRay's CRDs (ray.io_rayjobs.yaml, ray.io_rayclusters.yaml of its release)"
        )
    return Path(folder)


@cache
def crd_schema(plural: str) -> Object:
    """The OpenAPI schema of a kind of KubeRay's, in the version that is stored."""
    text = (crd_folder() / f"ray.io_{plural}.yaml").read_text()
    crd = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # megabytes
    version = next(each for each in crd["spec"]["versions"] if each["storage"])
    schema: Object = version["schema"]["openAPIV3Schema"]
    return schema


@cache
def validator(plural: str) -> jsonschema.Draft202012Validator:
    """Of objects of a kind of KubeRay's."""
    return validator_of(crd_schema(plural))


def validator_of(schema: Object) -> jsonschema.Draft202012Validator:
    """Of objects with this OpenAPI schema."""
    made = as_json_schema(schema)
    made["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(made)


def as_json_schema(schema: Object) -> Object:
    """OpenAPI as JSON Schema: what the server's own marks mean, and no field that is not named."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made: Object = {key: schema[key] for key in ("type", "enum", "required", "pattern", "minimum") if key in schema}
    if "properties" in schema:
        made["properties"] = {name: as_json_schema(each) for name, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = as_json_schema(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = as_json_schema(schema["items"])
    return made


def complaints(manifest: Object) -> list[str]:
    """What the schemas say against an object: KubeRay's, or Kubernetes' own."""
    if manifest["apiVersion"] == "ray.io/v1":
        found = validator(manifest["kind"].lower() + "s").iter_errors(manifest)
        said = [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]
        spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
        groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
        templates = [group["template"] for group in groups]
        templates += [manifest["spec"][key] for key in ("submitterPodTemplate",) if key in manifest["spec"]]
        for template in templates:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", **template.get("metadata", {})}}
            said += complaints({**pod, "spec": template["spec"]})
        return said
    import kubernetes_validate

    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


# --- the store --------------------------------------------------------------------------------------------------------


@dataclass
class Kube:
    """What is stored, and how it behaves. Tests and the operator's player change it directly, under `lock`."""

    namespace: str = "train"
    groups: set[str] = field(default_factory=lambda: {"ray.io", "policy", "scheduling.k8s.io", "authorization.k8s.io"})
    """API groups beside the core that are installed."""
    denied: set[tuple[str, str]] = field(default_factory=set)
    """(verb, resource) that our user may not do; a sub-resource as `pods/log`."""
    hook: Callable[[str, Object], None] | None = None
    """An admission webhook: (resource, object) -> raises Refused."""
    logs: dict[str, Path] = field(default_factory=dict)
    """Pod -> file that its container prints to."""
    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    """(resource, name)."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path with query) of all that was asked."""
    changes: list[tuple[int, str, str, Object]] = field(default_factory=list)
    """(version, type, resource, object), for watches."""
    compacted: int = 0
    """Versions up to this one are forgotten: watches from there are answered 410."""
    version: int = 100
    closed: bool = False
    """Streams end."""
    lock: threading.Condition = field(default_factory=lambda: threading.Condition(threading.RLock()))

    def all(self, resource: str) -> list[Object]:
        """Objects of a kind."""
        with self.lock:
            return [each for (kind, _), each in self.objects.items() if kind == resource]

    def get(self, resource: str, name: str) -> Object:
        """One; Refused 404."""
        with self.lock:
            if (resource, name) not in self.objects:
                message = f'{qualified(resource)} "{name}" not found'
                raise Refused(404, "NotFound", message, name=name, group=KINDS[resource][0], kind=resource)
            return self.objects[resource, name]

    def create(self, resource: str, body: Object, *, validate: bool = True, dry: bool = False) -> Object:
        """Make one; Refused 409, 422."""
        name = body["metadata"]["name"]
        group = KINDS[resource][0]
        with self.lock:
            if (resource, name) in self.objects:
                message = f'{qualified(resource)} "{name}" already exists'
                raise Refused(409, "AlreadyExists", message, name=name, group=group, kind=resource)
            self.check(resource, body, validate=validate)
            if dry:
                return body
            made = json.loads(json.dumps(body))
            made["metadata"] |= {
                "uid": f"uid-{self.version}", "creationTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "namespace": self.namespace,
            }  # fmt: skip
            return self.put("ADDED", resource, made)

    def check(self, resource: str, body: Object, *, validate: bool) -> None:
        """As admission does."""
        if self.hook is not None:
            self.hook(resource, body)
        if resource == "secrets":
            size = sum(len(base64.b64decode(value)) for value in body.get("data", {}).values())
            if size > SECRET_BYTES:
                raise Refused(422, "Invalid", f'Secret "{body["metadata"]["name"]}" is invalid: data: Too long')
        if validate and (said := complaints(body)):
            kind = KINDS[resource][2]
            raise Refused(422, "Invalid", f'{kind} "{body["metadata"]["name"]}" is invalid: {"; ".join(said)}')

    def put(self, kind: str, resource: str, changed: Object) -> Object:
        """Store a change and tell watches."""
        with self.lock:
            self.version += 1
            changed = json.loads(json.dumps(changed))
            changed["metadata"]["resourceVersion"] = str(self.version)
            key = (resource, changed["metadata"]["name"])
            if kind == "DELETED":
                self.objects.pop(key, None)
            else:
                self.objects[key] = changed
            self.changes.append((self.version, kind, resource, changed))
            self.lock.notify_all()
            return changed

    def update(self, resource: str, name: str, change: Object) -> Object:
        """A merge patch."""
        with self.lock:
            changed = self.put("MODIFIED", resource, merged(self.get(resource, name), change))
            self._finish(resource, changed)
            return changed

    def delete(self, resource: str, name: str, grace_s: int | None = None) -> None:
        """As the server does: what has finalizers is only marked; what it owns goes with it."""
        with self.lock:
            found = self.get(resource, name)
            if found["metadata"].get("finalizers"):
                change: Object = {} if grace_s is None else {"deletionGracePeriodSeconds": grace_s}
                if "deletionTimestamp" not in found["metadata"]:
                    change["deletionTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                if change:
                    self.put("MODIFIED", resource, merged(found, {"metadata": change}))
                return
            self._remove(resource, found)

    def _finish(self, resource: str, changed: Object) -> None:
        metadata = changed["metadata"]
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            self._remove(resource, changed)

    def _remove(self, resource: str, found: Object) -> None:
        self.put("DELETED", resource, found)
        uid = found["metadata"]["uid"]
        for kind, name in list(self.objects):
            owners = self.objects[kind, name]["metadata"].get("ownerReferences", [])
            if any(owner["uid"] == uid for owner in owners):
                self.delete(kind, name)

    def compact(self) -> None:
        """Forget what was: whoever watches has to list again."""
        with self.lock:
            self.version += 1
            self.compacted = self.version
            self.lock.notify_all()

    def event(self, about: str, reason: str, message: str) -> None:
        """Somebody says something about an object."""
        name = f"{about}.{self.version}"
        body = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": name}, "involvedObject": {"name": about},
                "reason": reason, "message": message, "type": "Warning"}  # fmt: skip
        self.create("events", body, validate=False)


def merged(old: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return change
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def fits(found: Object, query: dict[str, str]) -> bool:
    """Whether selectors mean an object."""
    labels = found["metadata"].get("labels", {})
    wanted = [each.split("=", 1) for each in query.get("labelSelector", "").split(",") if each]
    fields = [each.split("=", 1) for each in query.get("fieldSelector", "").split(",") if each]
    for path, value in fields:
        place: Any = found
        for part in path.split("."):
            place = place.get(part, {})
        if place != value:
            return False
    return all(labels.get(key) == value for key, value in wanted)


# --- HTTP -------------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One request."""

    kube: Kube
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PATCH = do_DELETE = do_GET

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.kube.requests.append((self.command, self.path))
        try:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "Unauthorized", "Unauthorized")
            self.route([unquote(part) for part in parts.path.strip("/").split("/")], query, body)
        except Refused as refused:
            self.send(refused.code, refused.body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def route(self, path: list[str], query: dict[str, str], body: Object) -> None:
        group = path[1] if path[0] == "apis" else ""
        if group and group not in self.kube.groups:
            self.send(404, b"404 page not found\n")
            return
        rest = path[3:] if path[0] == "apis" else path[2:]
        if not rest:
            self.send(200, {"kind": "APIResourceList", "groupVersion": "/".join(path[1:]), "resources": []})
            return
        if rest[0] == "namespaces" and len(rest) > 2:
            rest = rest[2:]
        resource, name, sub = rest[0], *[*rest[1:], "", ""][:2]
        if resource not in KINDS or KINDS[resource][0] != group:
            self.send(404, b"404 page not found\n")
            return
        self.authorise(resource, name, sub, query)
        if sub == "log":
            self.stream_log(name, follow=query.get("follow") == "true")
        elif query.get("watch"):
            self.stream_changes(resource, query)
        else:
            self.send(*self.act(resource, name, query, body))

    def authorise(self, resource: str, name: str, sub: str, query: dict[str, str]) -> None:
        verb = VERBS[self.command]
        if verb == "get" and not name:
            verb = "watch" if query.get("watch") else "list"
        full = f"{resource}/{sub}" if sub else resource
        if (verb, full) in self.kube.denied:
            group = KINDS[resource][0]
            what = f'{qualified(resource)} "{name}"' if name else qualified(resource)
            who = f'User "{USER}" cannot {verb} resource "{full}" in API group "{group}"'
            message = f'{what} is forbidden: {who} in the namespace "{self.kube.namespace}"'
            raise Refused(403, "Forbidden", message, group=group, kind=resource, **({"name": name} if name else {}))

    def act(self, resource: str, name: str, query: dict[str, str], body: Object) -> tuple[int, Object]:
        kube = self.kube
        if resource == "selfsubjectaccessreviews":
            asked = body["spec"]["resourceAttributes"]
            full = "/".join([asked["resource"], *([asked["subresource"]] if "subresource" in asked else [])])
            return 201, {**body, "status": {"allowed": (asked["verb"], full) not in kube.denied}}
        if self.command == "POST":
            self.strictly(resource, body, query)
            return 201, kube.create(resource, body, dry=bool(query.get("dryRun")))
        if self.command == "PATCH":
            return 200, kube.update(resource, name, body)
        if self.command == "DELETE":
            grace = query.get("gracePeriodSeconds")
            kube.delete(resource, name, None if grace is None else int(grace))
            return 200, {"kind": "Status", "status": "Success"}
        if name:
            return 200, kube.get(resource, name)
        with kube.lock:
            items = [each for each in kube.all(resource) if fits(each, query)]
            return 200, {"kind": "List", "metadata": {"resourceVersion": str(kube.version)}, "items": items}

    def strictly(self, resource: str, body: Object, query: dict[str, str]) -> None:
        """With fieldValidation=Strict, fields that the schema does not know are no mere warnings."""
        if query.get("fieldValidation") != "Strict":
            return
        unknown = [each for each in complaints(body) if "Additional properties" in each]
        if unknown:
            said = re.sub(r"Additional properties are not allowed \('([^']+)'.*", r"unknown field \1", unknown[0])
            raise Refused(400, "BadRequest", f'RayJob in version "v1" cannot be handled: strict decoding error: {said}')

    # --- streams ------------------------------------------------------------------------------------------------------

    def stream_changes(self, resource: str, query: dict[str, str]) -> None:
        since = int(query.get("resourceVersion") or 0)
        self.begin_stream()
        deadline = time.monotonic() + float(query.get("timeoutSeconds", 60))
        while time.monotonic() < deadline and not self.kube.closed:
            with self.kube.lock:
                if since < self.kube.compacted:
                    self.expire(since)
                    break
                new = [change for change in self.kube.changes if change[0] > since]
                if not new:
                    self.kube.lock.wait(0.2)
            for version, kind, changed_resource, changed in new:
                since = version
                if changed_resource == resource and fits(changed, query):
                    self.chunk(json.dumps({"type": kind, "object": changed}).encode() + b"\n")
        self.chunk(b"")

    def expire(self, since: int) -> None:
        message = f"too old resource version: {since} ({self.kube.version})"
        body = Refused(410, "Expired", message).body
        self.chunk(json.dumps({"type": "ERROR", "object": body}).encode() + b"\n")

    def stream_log(self, pod: str, *, follow: bool) -> None:
        self.kube.get("pods", pod)
        file = self.kube.logs.get(pod)
        if file is None:
            raise Refused(400, "BadRequest", f'container "ray-head" in pod "{pod}" is waiting to start')
        self.begin_stream()
        with file.open("rb") as log:
            while True:
                ended = not self.runs(pod)
                if data := log.read(65536):
                    self.chunk(data)
                elif ended or not follow or self.kube.closed:
                    break
                else:
                    time.sleep(0.05)
        self.chunk(b"")

    def runs(self, pod: str) -> bool:
        with self.kube.lock:
            found = self.kube.objects.get(("pods", pod), {})
        statuses = found.get("status", {}).get("containerStatuses", [])
        return any("running" in each["state"] for each in statuses)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def send(self, code: int, body: Object | bytes) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@dataclass(frozen=True)
class Served:
    """A server that answers, and the kubeconfig with which one gets to it."""

    kube: Kube
    kubeconfig: Path
    port: int

    def cluster(self, **changes: object) -> Object:
        """The `cluster` section of a recipe that runs there."""
        return {
            "type": "kubernetes", "kubeconfig": str(self.kubeconfig), "image": "registry.example/ftlaunch:0.1",
            "gpus_per_node": 0, "cpus_per_node": 1, "env": ["OMP_NUM_THREADS", "HF_HUB_*"], "doctor": False, **changes,
        }  # fmt: skip


@contextmanager
def kube_api(folder: Path) -> Iterator[Served]:
    """An empty cluster with KubeRay, and a namespace that is ours."""
    crd_folder()
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate has the schemas of Kubernetes' own kinds")
    kube = Kube()
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": kube.namespace}}
    kube.create("namespaces", space, validate=False)
    handler = type("KubeHandler", (Handler,), {"kube": kube})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    port = server.server_address[1]
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(json.dumps(kubeconfig_for(port, kube.namespace)))
    try:
        yield Served(kube, kubeconfig, port)
    finally:
        kube.closed = True
        server.shutdown()
        server.server_close()


def kubeconfig_for(port: int, namespace: str, token: str = TOKEN) -> Object:
    """As `kubectl config view` shows it."""
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": USER, "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "here", "user": USER, "namespace": namespace}}],
    }  # fmt: skip
