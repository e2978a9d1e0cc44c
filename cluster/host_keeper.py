"""What looks after a job on one host of an `ssh` cluster: it starts Ray there, on the first host the driver too, and
ends everything when it is over, whoever dies first.

Until the launcher lets go (`released`), a job lives as long as the launcher shows that it does (`lease`). From then on
the first host lives as long as the driver, and the others as long as the first one's Ray answers. A driver that was
killed is started again, and so is Ray where it has died: what the run needs then is said in `launcher/start.py`, which
counts how often. Nothing is left to somebody's good will: at the end every process with the job's mark is killed, and
where the keeper itself is killed, its children are by the kernel, and what is left by the next launcher that comes
(`host_agent.clean`).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .host_agent import end_processes, forget, put
from .restarts import SPOKE, QuickEnds, final, why_again

POLL_S = 0.2
LEASE_S = 40.0
"""A launcher that is there shows itself every few seconds; longer than the agent waits, which is told why."""

SEARCH_S = 120.0
"""For the first host's Ray to begin to answer."""

LOST_S = 30.0
"""Without an answer from the first host: a machine that is gone, or a network that is."""

REFUSED_S = 15.0
"""While the first host is there and its Ray is not: it may be starting again."""

ENDED_S = 0.5
"""While it is refused, to be sure that the first host's Ray is over: longer than a firewall takes to load its rules."""

RAY_END_S = 10.0
"""For a Ray that was killed to be gone, before it is left to itself."""

RAY_IS_UP = b"Ray runtime started"
DRIVER_ENDING_S = 60.0
"""For the driver to say what it has to when Ray on its host has ended, and is not started again."""

DRIVER_QUICK_S = 5.0
RAY_QUICK_S = 20.0
"""What ends sooner will not stay if it is started again."""

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def _login() -> dict[str, str]:
    """The login's variables, but for what it has set for a Ray of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


class Watch:
    """Looks whether the first host's Ray still answers. `clock` in seconds."""

    def __init__(self, address: Sequence[Any], clock: Callable[[], float] = time.monotonic) -> None:
        host, port = address
        self._address, self._clock = (str(host), int(port)), clock
        self._answered_s = clock()
        self._refused_since_s: float | None = None

    def why_not(self) -> tuple[float, str] | None:
        """Seconds for which its silence is borne, and what that means then; None: it answers."""
        refused_since_s, self._refused_since_s = self._refused_since_s, None
        try:
            socket.create_connection(self._address, timeout=2.0).close()
        except ConnectionRefusedError:
            self._refused_since_s = self._clock() if refused_since_s is None else refused_since_s
            return REFUSED_S, "the job on the first host has ended"
        except OSError:
            return LOST_S, "the first host does not answer any more"
        return None

    @property
    def has_ended(self) -> bool:
        """Whether the first host has said for a while that nobody listens there: the Ray that was there is over."""
        return self._refused_since_s is not None and self._clock() - self._refused_since_s >= ENDED_S

    def why_over(self) -> str | None:
        """Why it is over; None while it answers, or may again."""
        silence = self.why_not()
        if silence is None:
            self._answered_s = self._clock()
            return None
        return silence[1] if self._clock() - self._answered_s > silence[0] else None


class Keeper:
    """Of one job on one host, in its folder. `spec` is what the launcher wrote (see `ssh_job.py`)."""

    shielded: frozenset[signal.Signals] = frozenset()
    """Signals that nothing it starts is to get: schedulers send some to all processes of a job at once."""
    restarts = True
    """Whether a driver that dies, and Ray, are started again here; otherwise somebody starts the whole job again."""

    def __init__(self, folder: Path, spec: Mapping[str, Any]) -> None:
        self._folder, self._spec = folder, spec
        self._driver: subprocess.Popen[bytes] | None = None
        self._ray: subprocess.Popen[bytes] | None = None
        self._watch: Watch | None = None
        self._stopped = False
        self._ray_gone_s: float | None = None
        self._driver_ends, self._ray_ends = QuickEnds(DRIVER_QUICK_S), QuickEnds(RAY_QUICK_S)

    def run(self) -> str:
        """Keep the job until it is over; returns why it is."""
        if self._spec["driver"]:
            self._drive()
        why = None if self._driver else self._search()
        if why:
            return why
        self._start_ray()
        while (why := self._why_over()) is None:
            time.sleep(POLL_S)
        return why

    def _spawn(self, command: Sequence[str], log: str, folder: Path) -> subprocess.Popen[bytes]:
        with (self._folder / log).open("ab") as output:
            return subprocess.Popen(
                command, cwd=folder if folder.is_dir() else self._folder, env={**_login(), **self._spec["env"]},
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=self._before_exec,  # noqa: PLW1509 - there are no threads here
            )  # fmt: skip

    def _before_exec(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self.shielded)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the keeper

    def _drive(self, *again: str) -> None:
        self._driver_ends.started()
        (self._folder / SPOKE).unlink(missing_ok=True)
        kept = ["--kept", *again] if self.restarts else []
        self._driver = self._spawn([*self._spec["driver"], *kept], "driver.log", Path(self._spec["driver_folder"]))

    def _start_ray(self) -> None:
        self._ray_ends.started()
        self._ray = self._spawn(self._spec["ray"], "ray.log", self._folder)

    def _search(self) -> str | None:
        """Wait for the first host's Ray to answer; returns why that is over."""
        address = self._spec["ray_address"]
        deadline_s = time.monotonic() + SEARCH_S
        while Watch(address).why_not():
            if time.monotonic() > deadline_s:
                return "Ray on the first host did not begin to answer"
            if why := self._told() or self._left_alone():
                return why
            time.sleep(POLL_S)
        self._watch = Watch(address)
        return None

    def _why_over(self) -> str | None:
        if not self._has("up") and RAY_IS_UP in (self._folder / "ray.log").read_bytes():
            (self._folder / "up").touch()
        return self._told() or self._driver_ended() or self._ray_ended() or self._left_alone()

    def _has(self, name: str) -> bool:
        return (self._folder / name).exists()

    def _told(self) -> str | None:
        """Asked to stop: the driver saves and ends by itself, unless it is to be at once."""
        if not self._has("stop"):
            return None
        if (self._folder / "stop").read_text() == "now":
            return "stopped"
        if self._driver and not self._stopped:
            self._driver.send_signal(signal.SIGTERM)
            self._stopped = True
        return None

    @property
    def _may_restart(self) -> bool:
        return self.restarts and self._has("released") and not self._stopped

    def _ray_is_over(self, code: int) -> str | None:
        """The driver is given time to say what it has to."""
        now_s = time.monotonic()
        self._ray_gone_s = self._ray_gone_s or now_s
        if self._driver and now_s - self._ray_gone_s < DRIVER_ENDING_S:
            return None
        return f"Ray has ended (exit code {code})"

    def _driver_ended(self) -> str | None:
        if self._driver is None or (code := self._driver.poll()) is None:
            return None
        again = why_again(code, spoke=self._has(SPOKE)) if self._may_restart else None
        if again is not None and self._driver_ends.ended():
            self._drive(again)
            return None
        put(self._folder / "exit", str(final(code) if self.restarts else code))
        return "the driver has ended"

    def _ray_ended(self) -> str | None:
        """Ray is started again, with the driver where there is one: its ranks are gone with it. On other hosts that
        waits for the first one's."""
        if self._ray is not None and (code := self._ray.poll()) is not None:
            if not self._may_restart:
                return self._ray_is_over(code)
            if not self._ray_ends.ended():
                return f"Ray has ended (exit code {code})"
            self._end_ray()
            if self._driver:
                self._driver.wait()
                self._drive(f"Ray on the first host has ended (exit code {code})")
        if self._ray is not None and self._may_restart and self._watch is not None and self._watch.has_ended:
            # One that is there again within seconds is another one, and this host's, which asks for the one it knew,
            # would need half a minute to see that.
            self._end_ray()
        if self._ray is None and (self._watch is None or self._watch.why_not() is None):
            self._start_ray()
        return None

    def _end_ray(self) -> None:
        """With its ranks, and whatever else is the job's on this host."""
        end_processes(self._folder.name)
        if self._ray is not None:
            with suppress(subprocess.TimeoutExpired):
                self._ray.wait(RAY_END_S)
            self._ray = None

    def _left_alone(self) -> str | None:
        if not self._has("released"):
            silent_s = time.time() - (self._folder / "lease").stat().st_mtime
            return "the launcher went away before the job was under way" if silent_s > LEASE_S else None
        return self._watch.why_over() if self._watch else None


def main() -> None:
    """Keep the job whose folder is named, and leave nothing of it but its logs."""
    folder = Path(sys.argv[1])
    (folder / "keeper.pid").write_text(str(os.getpid()))
    why = "the keeper failed"
    try:
        why = Keeper(folder, json.loads((folder / "keeper.json").read_text())).run()
    finally:
        end_processes(folder.name)
        forget(folder, whole=False)
        put(folder / "ended", why)


if __name__ == "__main__":
    main()
