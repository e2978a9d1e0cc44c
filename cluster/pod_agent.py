"""What runs in the pods of a `kubernetes` cluster: it starts Ray as KubeRay says, on the head the driver too, and ends
them in an order in which nothing is lost. It imports the standard library only: an image that lacks something says so.

JOB/agent.json        what to do (see `kubernetes_job.py`)     WORK/package/   our code, unpacked
JOB/package.tar.xz    our code                                  WORK/start      KubeRay wants the driver started
JOB/driver.json       what the driver is told, on the head      WORK/stop       it is to save and end
WORK/driver.json  WORK/driver.log  the driver's                 WORK/exit       its exit code
WORK/leave            the pod is to end                         WORK/notice     so its ranks are to save and leave
WORK/ranks/PID        of each rank that works here

`agent.py node` is the pods' command; it ends when its pod is to. `agent.py driver` is the RayJob's entrypoint: Ray's
job server starts it on the head, tells it to end, and takes its exit code for the job's. It only passes that on: what
it would start itself is told to end more often than once, which would be no request to save any more.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

JOB = Path("/mnt/ftlaunch/job")
WORK = Path("/mnt/ftlaunch/work")
POLL_S = 0.2
GONE_S = 5.0
"""Without an answer from the head's Ray while the pods are ending, after which it is taken for gone."""

AGAIN, LEFT, ELSEWHERE, FAILED = 75, 76, 79, 2
"""Exit codes: of a driver that asks to be started again (EX_TEMPFAIL of sysexits.h), has left its nodes, or asks for
others (`restarts.py`); and what a shell is told of one that asks in vain."""

REPLACE_S = 30.0
"""For whoever follows the job to have unfit nodes replaced."""

QUICK_S = 30.0
MAX_QUICK = 3
"""A driver that was killed sooner than that after its start, so many times in a row, is not started again."""

STOP_S = 2.0
"""After a pod is told to end, for the word to come that the whole job is."""

NOTICE_S = 5.0
"""After a worker is told to end, for the driver to have been told that the whole job is. If it has not, the ranks are
given notice, so that they save and go on elsewhere."""

POD = "FTLAUNCH_POD"
"""Variable by which ranks know WORK."""

LAST_WORDS_S = 2.0
"""After the last rank has left, for Ray to pass on why."""

HEAD_S = 5.0
"""Between looks for the head's address."""

OLDEST_PYTHON = (3, 11)
UNFIT = 78
"""Exit code of a pod whose image cannot run ftlaunch (EX_CONFIG of sysexits.h)."""

DRIVE = """import sys

from {module} import {function}

sys.exit({function}())
"""
"""A program of its own in an empty folder: Ray puts a driver's folder on its workers' path."""


def mark(job: str) -> str:
    """Begins a line of the head's log that is for whoever follows the job."""
    return f"ftlaunch: job {job} "


def exit_mark(job: str) -> str:
    """What comes before the driver's exit code on the last line."""
    return f"{mark(job)}has ended with exit code "


def unfit_mark(job: str) -> str:
    """What comes before the addresses of unfit nodes, with commas."""
    return f"{mark(job)}needs others in place of "


class Node:
    """One pod. `spec` is agent.json."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._is_head = "FQ_RAY_IP" not in os.environ
        self._ray: subprocess.Popen[bytes] | None = None
        self._driver: subprocess.Popen[bytes] | None = None
        self._told = False
        self._quick, self._started_s = 0, 0.0
        self._asked_s: float | None = None
        """When other nodes were asked for."""
        self._shown = 0
        self._head: str | None = None
        """Address of the head's pod; its name is forgotten while it is still saving."""
        self._looked_s, self._answered_s, self._worked_s = -HEAD_S, time.monotonic(), 0.0

    def run(self) -> int:
        """Until Ray ends, or the pod is to; returns the pod's exit code."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        _unpack(JOB / "package.tar.xz", WORK / "package")
        self._ray = self._start_ray()
        code = None
        while code is None:
            time.sleep(POLL_S)
            self._show_log()
            code = self._step()
        self._show_log()
        return code

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        (WORK / "leave").touch()

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(WORK / "package"),
            # Folders of the driver's are no place to look for modules.
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            POD: str(WORK),
        }

    def _start_ray(self) -> subprocess.Popen[bytes]:
        """KubeRay's command, with the pod's place in the order of nodes: the head is the first."""
        address = os.environ["POD_IP"]
        place = 0 if self._is_head else int(ipaddress.ip_address(address))
        command = (
            f"{os.environ['KUBERAY_GEN_RAY_START_CMD']} --node-ip-address={address} --labels=ftlaunch-node={place}"
        )
        with (WORK / "ray.log").open("ab") as log:
            return subprocess.Popen(
                ["/bin/sh", "-c", f"ulimit -n 65536 2>/dev/null; exec {command}"], env=self._environment(), cwd=WORK,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _start_driver(self, *why: str) -> subprocess.Popen[bytes]:
        """`why`: it is started again, for this reason; empty: it asks for it."""
        self._started_s = time.monotonic()
        module, _, function = self._spec["entry"].partition(":")
        (WORK / "bin").mkdir(exist_ok=True)
        (WORK / "bin/drive").write_text(DRIVE.format(module=module, function=function))
        told = WORK / "driver.json"
        with os.fdopen(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write((JOB / "driver.json").read_bytes())
        folder = Path(self._spec["folder"])
        address = f"{os.environ['POD_IP']}:{os.environ['RAY_PORT']}"
        with (WORK / "driver.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", str(WORK / "bin/drive"), str(told), address, "--kept", *why],
                env=self._environment(), cwd=folder if folder.is_dir() else WORK, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _step(self) -> int | None:
        """Look at everything once; the pod's exit code when it is over."""
        if self._is_head:
            self._look_at_driver()
        if self._ray is not None and self._ray.poll() is not None:
            return self._ray_ended()
        if not (WORK / "leave").exists():
            self._find_head()
            return None
        if self._drives() if self._is_head else self._head_answers() and self._has_ranks():
            return None
        self._end_ray()
        return 0

    def _look_at_driver(self) -> None:
        leaving = (WORK / "leave").exists() or (WORK / "stop").exists()
        if self._driver is None:
            if (WORK / "start").exists() and not leaving:
                self._driver = self._start_driver()
            return
        code = self._driver.poll()
        if code is None:
            if leaving and not self._told:
                self._tell(self._driver)
        elif not (WORK / "exit").exists():
            self._driver_ended(code, leaving=leaving)

    def _driver_ended(self, code: int, *, leaving: bool) -> None:
        if (code == AGAIN or code < 0) and not leaving and self._may_start_again():
            self._driver = self._start_driver("" if code == AGAIN else f"the driver was killed (signal {-code})")
            return
        if code == ELSEWHERE:
            if not leaving and self._waits_for_others():
                return
            code = LEFT if leaving else FAILED
        code = FAILED if code == AGAIN else code if code >= 0 else 128 - code  # as shells have it for signals
        self._say(f"{exit_mark(self._spec['job'])}{code}")
        _put(WORK / "exit", str(code))

    def _waits_for_others(self) -> bool:
        """For a while, in which whoever follows the job may have unfit nodes replaced."""
        if self._asked_s is None:
            self._asked_s = time.monotonic()
            self._say(f"{unfit_mark(self._spec['job'])}{','.join((WORK / 'unfit').read_text().split())}")
        return time.monotonic() - self._asked_s < REPLACE_S

    def _say(self, line: str) -> None:
        """A line of its own, behind what the driver has printed."""
        self._show_log()
        if not _ends_line(WORK / "driver.log"):
            print()
        print(line, flush=True)

    def _tell(self, driver: subprocess.Popen[bytes]) -> None:
        """To save and end; where the pod is wanted back and the job is not to end, it goes on elsewhere."""
        if (WORK / "stop").exists():
            driver.send_signal(signal.SIGTERM)
        elif time.time() - (WORK / "leave").stat().st_mtime < STOP_S:
            return
        else:
            driver.send_signal(signal.SIGUSR1)
        self._told = True

    def _may_start_again(self) -> bool:
        """A driver that was killed is started again, but not one that is over and over."""
        self._quick = self._quick + 1 if time.monotonic() - self._started_s < QUICK_S else 0
        return self._quick < MAX_QUICK

    def _ray_ended(self) -> int | None:
        """The driver is left to say what it has to; then the pod ends as Ray did."""
        assert self._ray is not None
        if self._driver is not None and self._driver.poll() is None:
            return None
        if self._driver is None:
            print("\n".join((WORK / "ray.log").read_text(errors="replace").splitlines()[-30:]))
        print(f"Ray has ended (exit code {self._ray.returncode})", flush=True)
        return self._ray.returncode or 1

    def _find_head(self) -> None:
        """Now and then: another head may have come in its place."""
        if self._is_head or time.monotonic() - self._looked_s < HEAD_S:
            return
        self._looked_s = time.monotonic()
        with contextlib.suppress(OSError):
            self._head = str(socket.getaddrinfo(os.environ["FQ_RAY_IP"], None)[0][4][0])

    def _head_answers(self) -> bool:
        """Whether the head's Ray is there: the others leave after it, for the driver saves what their ranks hold."""
        if self._head is None:
            return False
        try:
            socket.create_connection((self._head, int(os.environ["RAY_PORT"])), timeout=2.0).close()
        except OSError:
            return time.monotonic() - self._answered_s < GONE_S
        self._answered_s = time.monotonic()
        return True

    def _drives(self) -> bool:
        return self._driver is not None and self._driver.poll() is None

    def _has_ranks(self) -> bool:
        """Whether this worker is needed: it has ranks, or has not given notice to those that it may have."""
        notice = WORK / "notice"
        if not notice.exists() and time.time() - (WORK / "leave").stat().st_mtime > NOTICE_S:
            notice.touch()
        if not notice.exists() or any(Path("/proc", rank.name).exists() for rank in (WORK / "ranks").glob("*")):
            self._worked_s = time.monotonic()
        return time.monotonic() - self._worked_s < LAST_WORDS_S

    def _end_ray(self) -> None:
        assert self._ray is not None
        os.killpg(self._ray.pid, signal.SIGTERM)
        try:
            self._ray.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._ray.pid, signal.SIGKILL)
            self._ray.wait()

    def _show_log(self) -> None:
        """The head's log is the driver's, so that `kubectl logs` shows the run."""
        self._shown = _copy_on(WORK / "driver.log", self._shown)


def node() -> int:
    """Keep this pod; returns its exit code."""
    if lacks := unfit():
        print(lacks, flush=True)
        return UNFIT
    return Node(json.loads((JOB / "agent.json").read_text())).run()


def unfit() -> str | None:
    """Why ftlaunch cannot run in this image; None: it can."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return f"the image's Python is {sys.version.split()[0]}; ftlaunch needs {oldest} or newer"
    needs = json.loads((JOB / "agent.json").read_text())["needs"]
    bad = [f"{need} ({has})" for need, has in zip(needs, map(_lack, needs), strict=True) if has]
    if not bad:
        return None
    return f"the image lacks what ftlaunch needs: {', '.join(bad)}. Build one as k8s/Dockerfile does."


def _lack(need: str) -> str | None:
    """What is there in place of a requirement; None: it is met."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        from packaging.requirements import Requirement

        wanted = Requirement(need)
        found = version(wanted.name)
    except (ImportError, PackageNotFoundError):
        return "not there"
    return None if wanted.specifier.contains(found, prereleases=True) else found


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as files:
        for member in files:
            content = files.extractfile(member)
            assert content is not None, "there is nothing but files in it"
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())


def driver() -> int:
    """Have the driver started, and wait for it; returns its exit code."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: (WORK / "stop").touch())
    (WORK / "start").touch()
    shown, ended = 0, False
    while not ended:
        time.sleep(POLL_S)
        ended = (WORK / "exit").exists()  # first: what is read afterwards is then whole
        shown = _copy_on(WORK / "driver.log", shown)
    return int((WORK / "exit").read_text())


def _copy_on(log: Path, shown: int) -> int:
    """Print what is behind `shown` bytes; returns how many there are now."""
    if not log.exists():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        new = file.read()
    sys.stdout.buffer.write(new)
    sys.stdout.flush()
    return shown + len(new)


def _ends_line(log: Path) -> bool:
    text = log.read_bytes()
    return not text or text.endswith(b"\n")


def _put(path: Path, text: str) -> None:
    """Whole, or not at all."""
    other = path.with_name(path.name + ".new")
    other.write_text(text)
    other.rename(path)


def as_init(work: Any) -> int:
    """Be a container's first process: pass signals on to `work`, and reap what others leave behind."""
    passed_on = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # until there is somebody to pass them on to
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
        return int(work())
    for number in passed_on:
        signal.signal(number, lambda caught, _frame: os.kill(child, caught))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def main() -> int:
    """`agent.py node` or `agent.py driver`."""
    work = {"node": node, "driver": driver}[sys.argv[1]]
    return as_init(work) if os.getpid() == 1 else work()


if __name__ == "__main__":
    sys.exit(main())
