"""Follows a job on Kubernetes to its end: why it does not run yet, what its driver prints, how it ends.

Threads watch the RayJob and its pods and read the head's log; what they find comes through one queue, and everything is
decided in one place.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from ..recipes.errors import InfrastructureError, Interrupted, UserError
from . import kubernetes_causes, kubernetes_look
from .kubernetes_api import Api, ApiError, Gone, Object
from .kubernetes_causes import Cause
from .kubernetes_checks import rayjobs
from .kubernetes_job import HEAD
from .kubernetes_look import TERMINAL, Place, selector_of
from .kubernetes_replace import Replacement
from .pod_agent import exit_mark, mark, unfit_mark
from .restarts import LEFT, LEFT_EARLY

TICK_S = 1.0
AGAIN_S = 2.0
"""Before what has broken off is asked for again."""

LOST_S = 60.0
"""For which the server may be silent."""

EVENTS_S = 5.0
"""Between looks at events while the job does not run."""

HOPELESS_S = 20.0
"""For which something that waiting does not mend is given the benefit of the doubt: registries fail for moments."""

OPERATOR_S = 60.0
"""For KubeRay's operator to say anything about the job."""

FINAL = (0, 1)
"""Exit codes after which a driver is not started again: it is done, or the user has to mend something."""


LogNews = tuple[str, bytes | None]
"""Pod, and what its log says now; None: that it has broken off or ended."""


class Watched(threading.Thread):
    """Objects of one kind as they are now. `tell` is called at every change."""

    def __init__(self, api: Api, path: tuple[str, ...], query: Mapping[str, str], tell: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._api, self._path, self._query, self._tell = api, path, dict(query), tell
        self._closed = threading.Event()
        self._answered_s = time.monotonic()
        self.objects: dict[str, Object] | None = None
        """By name; None before the first answer."""
        self.error: Exception | None = None
        """Why there will be no more news."""
        self.start()

    def run(self) -> None:
        while not self._closed.is_set():
            try:
                self._keep_up()
            except Gone:
                continue
            except InfrastructureError as error:
                if time.monotonic() - self._answered_s > LOST_S:
                    self._fail(error)
                    return
                self._closed.wait(AGAIN_S)
            except ApiError as error:
                self._fail(error)
                return

    def _keep_up(self) -> None:
        """List, and take every change from there on, until the server breaks off."""
        listed = self._api.get(*self._path, **self._query)
        self._change({each["metadata"]["name"]: each for each in listed["items"]})
        version = listed["metadata"]["resourceVersion"]
        while not self._closed.is_set():
            for event in self._api.watch(*self._path, **self._query, resourceVersion=version):
                changed = event["object"]
                version = changed["metadata"]["resourceVersion"]
                self._answered_s = time.monotonic()
                if event["type"] != "BOOKMARK":
                    self._take(event["type"], changed)

    def _take(self, kind: str, changed: Object) -> None:
        objects = dict(self.objects or {})
        objects.pop(changed["metadata"]["name"], None)
        if kind != "DELETED":
            objects[changed["metadata"]["name"]] = changed
        self._change(objects)

    def _change(self, objects: dict[str, Object]) -> None:
        self.objects = objects
        self._answered_s = time.monotonic()
        self._tell()

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._tell()

    def close(self) -> None:
        """No more news are wanted."""
        self._closed.set()


class Filter:
    """Takes what is for us out of the head's log: the driver's exit code, which nodes are not fit."""

    def __init__(self, job: str) -> None:
        code, unfit = (re.escape(text.encode()) for text in (exit_mark(job), unfit_mark(job)))
        self._line = re.compile(rb"(?:%s(?P<code>-?\d+)|%s(?P<unfit>\S+))\n" % (code, unfit))
        self._mark = mark(job).encode()
        self._kept = b""
        self.code: int | None = None
        self.unfit: tuple[str, ...] = ()
        """Addresses of nodes that the driver has found unfit."""

    def feed(self, data: bytes) -> bytes:
        """What of it is to be shown now."""
        shown, text, self._kept = b"", self._kept + data, b""
        while self.code is None and (found := self._line.search(text)):
            shown, text = shown + text[: found.start()], text[found.end() :]
            self._take(found)
        if self.code is not None:
            return shown
        line = text.rfind(b"\n") + 1
        last = text[line:]
        # What may become a mark is held back.
        at = line if self._mark.startswith(last) or last.startswith(self._mark) else len(text)
        self._kept = text[at:]
        return shown + text[:at]

    def _take(self, found: re.Match[bytes]) -> None:
        if found["code"] is not None:
            self.code = int(found["code"])
        else:
            self.unfit = tuple(found["unfit"].decode().split(","))


@dataclass
class PodLog:
    """The log of one head, read on from where it broke off."""

    pod: str
    filter: Filter
    shown: int = 0
    """Bytes that have been passed on."""
    reading: bool = False
    ended_s: float | None = None
    """When the server last ended it."""

    def read(self, api: Api, put: Callable[[bytes | None], None], *, follow: bool = True) -> None:
        """Pass on what is new, and None when the server ends it; a log that is followed ends with its pod."""
        seen = 0
        path = ("api", "v1", "namespaces", api.namespace, "pods", self.pod, "log")
        try:
            for data in api.stream(*path, follow=str(follow).lower(), container=HEAD):
                new = data[max(0, self.shown - seen) :]
                seen += len(data)
                if new:
                    self.shown = seen
                    put(new)
        except (ApiError, Gone, InfrastructureError):
            pass  # it is asked for again; where that cannot help, the watches fail too
        finally:
            put(None)


@dataclass
class Follower:
    """Of one job. `write` gets what is to be shown."""

    api: Api
    place: Place
    write: Callable[[bytes], None]
    clock: Callable[[], float] = time.monotonic
    _news: queue.Queue[LogNews | None] = field(default_factory=queue.Queue)
    _logs: dict[str, PodLog] = field(default_factory=dict)
    _begun: bool = False
    """Whether the driver has printed anything."""
    _known: dict[str, tuple[float, Cause]] = field(default_factory=dict)
    """What keeps the job from running, by its text, and since when."""
    _said: list[str] = field(default_factory=list)
    _looked_s: float = -1e9
    _events: list[Object] = field(default_factory=list)
    _workloads: list[Object] = field(default_factory=list)

    def run(self) -> int:
        """Until the job is over; the driver's exit code. Raises UserError for what somebody has to mend, and
        InfrastructureError for a job that is lost."""
        self._begun_s = self.clock()
        self._replacement = Replacement(self.api, self.place.name, self.write)
        space = ("api", "v1", "namespaces", self.api.namespace, "pods")
        selector = {"fieldSelector": f"metadata.name={self.place.name}"}
        self._rayjobs = Watched(self.api, rayjobs(self.api), selector, self._tell)
        self._pods = Watched(self.api, space, {"labelSelector": selector_of(self.place)}, self._tell)
        try:
            while (code := self._look()) is None:
                for pod, data in self._wait():
                    self._show(pod, data)
            return code
        finally:
            self._rayjobs.close()
            self._pods.close()

    def _tell(self) -> None:
        self._news.put(None)

    def _wait(self) -> Iterator[LogNews]:
        """News of logs, once anything has changed, or after a while."""
        try:
            first = self._news.get(timeout=TICK_S)
        except queue.Empty:
            return
        more = [self._news.get_nowait() for _ in range(self._news.qsize())]
        yield from (news for news in [first, *more] if news is not None)

    def _show(self, pod: str, data: bytes | None) -> None:
        log = self._logs[pod]
        if data is None:
            log.reading, log.ended_s = False, self.clock()
            return
        self._begun = True
        if text := log.filter.feed(data):
            self.write(text)

    @property
    def _newest(self) -> PodLog | None:
        """Of the head that was started last: what an earlier one's log says late is not about it."""
        return next(reversed(self._logs.values()), None)

    @property
    def _code(self) -> int | None:
        """With which the driver has ended, if it is not started again by now."""
        return self._newest.filter.code if self._newest else None

    @property
    def _unfit(self) -> tuple[str, ...]:
        """Addresses of nodes that it has found unfit."""
        return self._newest.filter.unfit if self._newest else ()

    # --- decisions ----------------------------------------------------------------------------------------------------

    def _look(self) -> int | None:
        """Look at everything once; the exit code when it is over."""
        if (error := self._rayjobs.error or self._pods.error) is not None:
            raise InfrastructureError(f"the job cannot be watched any more: {error}; it may go on") from error
        if self._rayjobs.objects is None or self._pods.objects is None:
            return None
        if self._code in FINAL:
            return self._code
        pods, rayjob = self._pods.objects, self._rayjobs.objects.get(self.place.name)
        self._read_logs(pods)
        reading = self._code is None and any(log.reading for log in self._logs.values())
        if rayjob is None:
            return None if reading else self._gone()
        if (rayjob.get("status") or {}).get("jobDeploymentStatus") in TERMINAL and not reading:
            return self._over(rayjob, pods)
        self._replacement.look(rayjob, pods, self._newest.pod if self._newest else "", self._unfit)
        self._say_what_is_missing(rayjob, pods)
        return None

    def _ended_before(self, rayjob: Object) -> list[str]:
        """The driver has ended and the job has not: it is started again, by KubeRay or when Kueue has room."""
        if self._code is None or self._unfit:  # which has been said
            return []
        if not (rayjob["spec"].get("backoffLimit") or rayjob["spec"].get("suspend")):
            return []
        return [f"the driver has ended with exit code {self._code}; the job is started again"]

    def _gone(self) -> int:
        if self._code is None:
            raise InfrastructureError(f"RayJob {self.place.name} is not there any more: somebody has deleted it")
        return _shown(self._code)

    def _over(self, rayjob: Object, pods: Mapping[str, Object]) -> int:
        if self._code is None and (log := self._newest) is not None:  # it broke off: its end may still be there
            log.read(self.api, partial(self._show, log.pod), follow=False)
        if self._code is not None:
            return _shown(self._code)
        why = [kubernetes_causes.failed(rayjob), *(kubernetes_causes.ended(pod) for pod in pods.values())]
        found = [str(cause) for cause in self._causes(rayjob, pods) if cause.text not in why]
        said = "\n".join(filter(None, [*why, *found])) or "its pods are gone, and with them its last words"
        raise InfrastructureError(f"job {self.place.job} is over, and its driver did not say how it ended: {said}")

    def _read_logs(self, pods: Mapping[str, Object]) -> None:
        """Of the newest head; another one than before means that the job was started again."""
        head = kubernetes_causes.head_of(pods.values())
        if head is None or not kubernetes_causes.has_started(head):
            return
        name = head["metadata"]["name"]
        if name not in self._logs:
            self._logs[name] = PodLog(name, Filter(self.place.job))
        log = self._logs[name]
        if log.reading or self._code is not None:
            return
        if log.ended_s is not None and self.clock() - log.ended_s < AGAIN_S:
            return
        log.reading = True
        put = partial(self._put, name)
        threading.Thread(target=log.read, args=(self.api, put), daemon=True).start()

    def _put(self, pod: str, data: bytes | None) -> None:
        self._news.put((pod, data))

    # --- what is missing ----------------------------------------------------------------------------------------------

    def _say_what_is_missing(self, rayjob: Object, pods: Mapping[str, Object]) -> None:
        for pod in pods.values():
            if (lacks := kubernetes_causes.unfit(pod)) is not None:
                raise UserError(f"job {self.place.job} cannot start: {lacks}")
        now_s = self.clock()
        # A cause keeps its first remedy: pulls that are put off do not say any more what was wrong.
        self._known = {cause.text: self._known.get(cause.text, (now_s, cause)) for cause in self._causes(rayjob, pods)}
        found = [cause for _, cause in self._known.values()]
        if not self._begun:
            for since_s, cause in self._known.values():
                if cause.hopeless and now_s - since_s >= HOPELESS_S:
                    raise UserError(f"job {self.place.job} cannot start: {cause}")
            self._expect_operator(rayjob)
        lines = [*self._ended_before(rayjob), *(f"waiting: {cause}" for cause in found)]
        if not self._begun and not found:
            lines = [f"waiting: {kubernetes_causes.counted(pods.values(), self.place.nodes)}"]
        for line in lines:
            if line not in self._said:
                self.write(f"{line}\n".encode())
        self._said = lines

    def _expect_operator(self, rayjob: Object) -> None:
        if (rayjob.get("status") or {}).get("jobDeploymentStatus") or self.clock() - self._begun_s < OPERATOR_S:
            return
        raise UserError(
            f"cluster.namespace: no KubeRay operator takes the job up in {self.api.namespace}: it has said nothing "
            f"for {OPERATOR_S:g} s. It may watch other namespaces only, or not run: k8s/README.md says how it is "
            "installed."
        )

    def _causes(self, rayjob: Object, pods: Mapping[str, Object]) -> list[Cause]:
        if not self._begun and self.clock() - self._looked_s >= EVENTS_S:
            self._looked_s = self.clock()
            self._events = kubernetes_look.events(self.api, self.place, rayjob, pods.values())
            self._workloads = kubernetes_look.workloads(self.api, rayjob)
        late = kubernetes_look.late_pods(pods.values())
        return kubernetes_causes.causes(rayjob, late, self._events, self._workloads)


def _shown(code: int) -> int:
    """A driver that has left its nodes, in a job that is not started again, was interrupted."""
    return Interrupted.exit_code if code in (LEFT, LEFT_EARLY) else code
