"""Talks to a Kubernetes API server in plain JSON.

Who we are to it is a matter for the official client's `kubernetes.config`, which knows what providers write into
kubeconfigs: programs that fetch tokens (`exec`), certificates, several files, the account of a pod. Its models, a class
for every kind of object, are not used: what we send is what `render` shows. It is imported when a cluster is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from ..recipes.errors import InfrastructureError, KeyedError, UserError
from ..recipes.schema_kubernetes import KubernetesCluster

if TYPE_CHECKING:
    import urllib3

CONNECT_S, READ_S = 10.0, 60.0
WATCH_S = 240
"""A watch is begun anew so often; servers end them after some minutes themselves."""

CHUNK_BYTES = 1 << 16
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"

Object = dict[str, Any]


class ApiError(Exception):
    """An answer that is no success: its HTTP code, and the `Status` object that came with it."""

    def __init__(self, code: int, reason: str, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message or reason or f"HTTP {code}")
        self.code, self.reason, self.details = code, reason, details

    @property
    def lacks_kind(self) -> bool:
        """Whether the server does not know the kind of object, rather than the object."""
        return self.code == 404 and not self.details.get("name")


class Gone(Exception):
    """What a watch was to go on from is too old (410): list again."""


@dataclass
class Api:
    """A server, as one user sees it. `configuration` is the official client's."""

    configuration: Any
    context: str | None
    namespace: str
    pool: urllib3.PoolManager | urllib3.ProxyManager

    def get(self, *path: str, **query: str | int) -> Object:
        """An object or a list. Raises ApiError and InfrastructureError, as all of these do."""
        return self._ask("GET", path, query)

    def post(self, body: Object, *path: str, **query: str | int) -> Object:
        """Make an object."""
        return self._ask("POST", path, query, body)

    def patch(self, body: Object, *path: str) -> Object:
        """Change some of an object (RFC 7386)."""
        return self._ask("PATCH", path, {}, body, MERGE_PATCH)

    def delete(self, *path: str, **query: str | int) -> None:
        """Have an object removed; one that is not there is fine."""
        try:
            self._ask("DELETE", path, query)
        except ApiError as error:
            if error.code != 404:
                raise

    def watch(self, *path: str, **query: str | int) -> Iterator[Object]:
        """Events `{"type", "object"}` from a resource version on, for some minutes. Raises Gone as well."""
        query = {"watch": 1, "timeoutSeconds": WATCH_S, "allowWatchBookmarks": "true", **query}
        rest = b""
        for data in self.stream(*path, **query):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                event: Object = json.loads(line)
                if event["type"] == "ERROR":
                    _raise_for(event["object"].get("code", 500), event["object"])
                yield event

    def stream(self, *path: str, **query: str | int) -> Iterator[bytes]:
        """What the server sends, as it comes, until it ends or is silent for too long."""
        response = self._send("GET", path, query, None, JSON, WATCH_S + READ_S)
        try:
            with _connection_errors(self.configuration.host):
                while data := response.read1(CHUNK_BYTES):
                    yield data
        finally:
            response.close()

    def close(self) -> None:
        """Let go."""
        self.pool.clear()

    def _ask(
        self, method: str, path: tuple[str, ...], query: Mapping[str, str | int], body: Object | None = None,
        kind: str = JSON,
    ) -> Object:  # fmt: skip
        response = self._send(method, path, query, body, kind, READ_S)
        with _connection_errors(self.configuration.host):
            answer: Object = json.loads(response.read() or b"{}")
        response.release_conn()
        return answer

    def _send(
        self, method: str, path: tuple[str, ...], query: Mapping[str, str | int], body: Object | None, kind: str,
        read_s: float,
    ) -> Any:  # fmt: skip
        import urllib3

        url = self.configuration.host.rstrip("/") + "".join(f"/{quote(part, safe='')}" for part in path)
        again = urllib3.Retry(2, backoff_factor=0.5, redirect=False) if method == "GET" else False
        with _connection_errors(self.configuration.host):
            response = self.pool.request(
                method, f"{url}?{urlencode(query)}", headers={**self._headers(), "Content-Type": kind},
                body=None if body is None else json.dumps(body).encode(), preload_content=False, retries=again,
                timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s),
            )  # fmt: skip
            if response.status >= 300:
                _raise_for(response.status, _as_status(response.read()))
        return response

    def _headers(self) -> dict[str, str]:
        """Tokens are fetched again when they run out."""
        settings = self.configuration.auth_settings().values()
        found = {each["key"]: each["value"] for each in settings if each["in"] == "header" and each["value"]}
        return {**found, "Accept": JSON, "User-Agent": "ftlaunch"}


def _as_status(body: bytes) -> Object:
    """Proxies on the way answer in other words than the server."""
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {"message": body.decode(errors="replace").strip()[:500]}


def _raise_for(code: int, status: Mapping[str, Any]) -> None:
    if code == 410:
        raise Gone
    raise ApiError(code, status.get("reason") or "", status.get("message") or "", status.get("details") or {})


@contextmanager
def _connection_errors(host: str) -> Iterator[None]:
    import urllib3

    try:
        yield
    except urllib3.exceptions.HTTPError as error:
        why = getattr(error, "reason", None) or error
        raise InfrastructureError(f"the Kubernetes API server at {host} does not answer: {why}") from error


# --- connecting -------------------------------------------------------------------------------------------------------


def connect(config: KubernetesCluster) -> Api:
    """The server that a recipe names. Raises UserError."""
    try:
        from kubernetes import client
        from kubernetes import config as files
    except ModuleNotFoundError as error:
        raise UserError("cluster.type: kubernetes needs the Kubernetes client: pip install 'ftlaunch[k8s]'") from error
    configuration = client.Configuration()
    context: str | None = None
    try:
        if config.context is None and config.kubeconfig is None and _in_cluster():
            files.load_incluster_config(client_configuration=configuration)
            namespace = _own_namespace()
        else:
            contexts, current = files.list_kube_config_contexts(config.kubeconfig)
            chosen = _choose(contexts, current, config.context)
            context, namespace = chosen["name"], chosen["context"].get("namespace") or "default"
            files.load_kube_config(config.kubeconfig, context, configuration, persist_config=False)
    except files.ConfigException as error:
        key = "cluster.kubeconfig" if config.kubeconfig else "cluster.context"
        raise KeyedError(f"{error}. `kubectl config get-contexts` lists what is there.", key) from None
    return Api(configuration, context, config.namespace or namespace, _pool(configuration))


def _choose(contexts: list[Object], current: Object | None, wanted: str | None) -> Object:
    if wanted is None:
        if current is None:
            raise KeyedError("the kubeconfig has no current context: name one", "cluster.context")
        return current
    for each in contexts:
        if each["name"] == wanted:
            return each
    names = ", ".join(each["name"] for each in contexts)
    raise KeyedError(f"{wanted} is not in the kubeconfig, which has {names or 'none'}", "cluster.context")


def _in_cluster() -> bool:
    """Whether this is a pod with an account, and no kubeconfig says otherwise."""
    from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION

    places = [Path(place).expanduser() for place in KUBE_CONFIG_DEFAULT_LOCATION.split(":")]
    return not any(place.is_file() for place in places) and Path(SERVICE_ACCOUNT, "token").is_file()


def _own_namespace() -> str:
    return Path(SERVICE_ACCOUNT, "namespace").read_text().strip()


def _pool(configuration: Any) -> urllib3.PoolManager | urllib3.ProxyManager:
    import certifi
    import urllib3

    settings: dict[str, Any] = {
        "num_pools": 4,
        "maxsize": 8,
        "cert_reqs": "CERT_REQUIRED" if configuration.verify_ssl else "CERT_NONE",
        "ca_certs": configuration.ssl_ca_cert or certifi.where(),
        "cert_file": configuration.cert_file,
        "key_file": configuration.key_file,
    }
    if name := getattr(configuration, "tls_server_name", None):
        settings |= {"server_hostname": name, "assert_hostname": name}
    if not configuration.verify_ssl:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    if configuration.proxy:
        return urllib3.ProxyManager(configuration.proxy, **settings)
    return urllib3.PoolManager(**settings)
