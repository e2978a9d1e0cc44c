"""Notices that a machine is about to be taken away, read on the machine itself. A cloud's for a spot machine comes 30 s
(Google, Azure) to 2 min (AWS) before; only machines that say that they are a cloud's are asked. In a pod of Kubernetes
it is a file, made by who looks after the pod (`cluster/pod_agent.py`), which is told in turn where ranks work.

AWS: "Spot Instance interruption notices" (instance metadata, version 2). Google: "Preemptible VM instances", the value
`preempted`. Azure: "Scheduled Events", type Preempt.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

METADATA = "http://169.254.169.254"
VENDOR = Path("/sys/class/dmi/id/sys_vendor")
EVERY_S, POD_EVERY_S = 5.0, 0.5
ANSWER_S = 2.0

Fetch = Callable[[str, str, Mapping[str, str]], str | None]
"""(method, path, headers) -> the answer's text; None: there is nothing of that name."""


@dataclass(frozen=True)
class Cloud:
    """`vendor`: what its machines say in their DMI table; `ask`: whether this one is about to be taken away."""

    vendor: str
    ask: Callable[[Fetch], bool]


def _aws(fetch: Fetch) -> bool:
    token = fetch("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}) or ""
    return fetch("GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}) is not None


def _google(fetch: Fetch) -> bool:
    said = fetch("GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return (said or "").strip().upper() == "TRUE"


def _azure(fetch: Fetch) -> bool:
    said = fetch("GET", "/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    return any(event["EventType"] == "Preempt" for event in json.loads(said or "{}").get("Events", ()))


CLOUDS = (Cloud("Amazon EC2", _aws), Cloud("Google", _google), Cloud("Microsoft Corporation", _azure))


def cloud_of(vendor: Path = VENDOR) -> Cloud | None:
    """The cloud that this machine is of; None: of none."""
    try:
        said = vendor.read_text().strip()
    except OSError:
        return None
    return next((cloud for cloud in CLOUDS if cloud.vendor == said), None)


def fetching(base: str = METADATA) -> Fetch:
    """Asks the metadata server at `base`. What it does not answer in time, it has not said."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fetch(method: str, path: str, headers: Mapping[str, str]) -> str | None:
        request = urllib.request.Request(base + path, method=method, headers=dict(headers))  # noqa: S310 - http, ours
        try:
            with direct.open(request, timeout=ANSWER_S) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, OSError, ValueError):
            return None

    return fetch


def watch(notice: Callable[[], None], cloud: Cloud | None, fetch: Fetch, every_s: float = EVERY_S) -> None:
    """Look from now on, in the background; `notice` is called once, when the machine is about to be taken away."""
    if cloud is not None:
        _look(notice, partial(cloud.ask, fetch), every_s)


def watch_pod(notice: Callable[[], None], pod: str | None, every_s: float = POD_EVERY_S) -> None:
    """The same for a pod whose files lie there; None: this is none."""
    if pod is not None:
        _look(notice, Path(pod, "notice").exists, every_s)


@contextmanager
def at_work(pod: str | None) -> Iterator[None]:
    """While this lasts, the pod is not ended under the rank that this process is."""
    if pod is None:
        yield
        return
    mark = Path(pod, "ranks", str(os.getpid()))
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    try:
        yield
    finally:
        mark.unlink()


def _look(notice: Callable[[], None], is_going: Callable[[], bool], every_s: float) -> None:
    pause = threading.Event()

    def look() -> None:
        while not is_going():
            pause.wait(every_s)
        notice()

    threading.Thread(target=look, name="notices", daemon=True).start()
