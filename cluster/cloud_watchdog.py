"""What ends a machine that a run has taken from a cloud, on the machine itself: when nothing of a run has happened
there for a while, when its run is over, and after the most hours that it may take. So no machine outlives whoever
started it, killed or cut off.

Its text travels to the machine, with a call of `main` at its end: among what a machine does when it first starts, and
over SSH. It runs as root, and imports the standard library only, of any Python 3 that is still about.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what stands here is evaluated on old Pythons too
    from collections.abc import Mapping, Set

    Settings = Mapping[str, Any]

# By this variable all processes of a job are known (`host_agent.JOB`).
MARK = b"FTLAUNCH_JOB="
# Its value while a launcher is at work on the machine. It counts for some time only: a launcher may be cut off.
HELD = b"starting"

POLL_S = 2.0
AGAIN_S = 30.0
ANSWER_S = 30.0


class Watch:
    """When to end. All times in seconds since this began. `idle_s`: without anything; `linger_s`: after a job, for
    whoever wants to read its last words; `begin_s`: for a launcher to get a job under way; `max_s`: in all; None: any.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._used_s = 0.0
        self._had_job = False

    def why_end(self, marks: Set[bytes], now_s: float) -> str | None:
        """Why the machine is to end, given the marks of the processes on it; None: it is not."""
        settings = self._settings
        has_job = any(mark != HELD for mark in marks)
        if has_job or (HELD in marks and now_s < settings["begin_s"]):
            self._used_s = now_s
        self._had_job = self._had_job or has_job
        if settings["max_s"] is not None and now_s > settings["max_s"]:
            return "it has been there for as long as it may"
        idle_s = now_s - self._used_s
        if self._had_job and idle_s > min(settings["linger_s"], settings["idle_s"]):
            return "its job is over"
        return "nothing of a run happens here" if idle_s > settings["idle_s"] else None


def marks_here() -> set[bytes]:
    """The marks of all processes."""
    found: set[bytes] = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            found.update(word[len(MARK) :] for word in words if word.startswith(MARK))
    return found


# --- how a machine ends -----------------------------------------------------------------------------------------------


def ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    """The answer's text."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)  # noqa: S310 - ours
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=ANSWER_S) as answer:
        return str(answer.read().decode())


def power_off(_settings: Settings) -> None:
    """AWS: the machine was made to be terminated by this, its disk with it."""
    for command in (["systemctl", "poweroff"], ["shutdown", "-P", "now"], ["poweroff", "-f"]):
        try:
            if subprocess.call(command) == 0:
                return
        except OSError:  # it is not there
            continue


def delete_at_google(settings: Settings) -> None:
    """By its own service account, if it has one that may. Powered off in any case: then only the disk costs, and the
    machine cannot go on."""
    try:
        base = settings["metadata"] + "/computeMetadata/v1/"
        own = {"Metadata-Flavor": "Google"}
        token = json.loads(ask(base + "instance/service-accounts/default/token", own))["access_token"]
        zone = ask(base + "instance/zone", own)
        name = ask(base + "instance/name", own)
        url = settings["api"] + "/compute/v1/" + zone + "/instances/" + name
        ask(url, {"Authorization": "Bearer " + token}, "DELETE")
    finally:
        power_off(settings)


def delete_at_azure(settings: Settings) -> None:
    """By its managed identity. Its disk, network interface and address were made to go with it. Not powered off: a
    machine that has stopped itself is paid for, and could not delete itself any more."""
    own = {"Metadata": "true"}
    base = settings["metadata"] + "/metadata/"
    query = "identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fmanagement.azure.com%2F"
    token = json.loads(ask(base + query, own))["access_token"]
    name = json.loads(ask(base + "instance/compute?api-version=2021-02-01", own))["resourceId"]
    ask(settings["api"] + name + "?api-version=2024-07-01", {"Authorization": "Bearer " + token}, "DELETE")


END = {"aws": power_off, "gcp": delete_at_google, "azure": delete_at_azure}


# --- the program ------------------------------------------------------------------------------------------------------


def only_one(path: str) -> bool:
    """Whether this is the first of its kind on the machine. It stays so while it lives."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def detach() -> None:
    """Go on without whoever started this; returns in the child only."""
    if os.fork():
        os._exit(0)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)


def main(settings: Settings) -> None:
    """Watch until there is a reason to end the machine, then end it, again and again until that has worked."""
    first = only_one(settings["lock"])
    sys.stdout.write("the machine is watched\n")
    sys.stdout.flush()
    if not first:
        return
    if settings["detached"]:
        detach()
    watch, began_s = Watch(settings), time.monotonic()
    while watch.why_end(marks_here(), time.monotonic() - began_s) is None:
        time.sleep(POLL_S)
    while True:
        try:
            END[settings["provider"]](settings)
        except Exception as error:  # whatever it is, the next try may work
            sys.stderr.write(str(error) + "\n")
        time.sleep(AGAIN_S)
