"""A rank's side of a reader process: starts it, takes its parts, and ends it."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import weakref
from typing import Any

from ...recipes.errors import InfrastructureError
from . import wire
from .feed import AHEAD_BYTES, nbytes_of
from .parts import Part, PartSpec, States

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from ftlaunch.distributed.data.reader_process import main; main(int(sys.argv[1]))"
)
"""Not multiprocessing's spawn, which runs this process's main module again: under Ray that is a worker's."""

DYING_S = 5.0
"""For a process whose socket is closed to be gone."""


class ProcessFeed:
    """A reader in a process of its own. It starts at once, so that it is ready when `begin` is called."""

    def __init__(self, spec: PartSpec, *, ahead_bytes: int = AHEAD_BYTES) -> None:
        """Raises InfrastructureError when no process can be started."""
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = _start(theirs)
        self._finalizer = weakref.finalize(self, _end, self._process, self._channel)
        self._failure: BaseException | None = None
        self._initial: bytes | None = None
        self._say((spec, ahead_bytes))

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def begin(self, states: States | None) -> None:
        self._say((states,))

    def initial_states(self) -> bytes:
        if self._initial is None:
            self._initial = self._receive()
        return self._initial

    def next_part(self) -> Part:
        self.initial_states()
        part: Part = self._receive()
        wire.send_taken(self._channel, nbytes_of(part))
        return part

    def close(self) -> None:
        self._finalizer()

    def _say(self, content: Any) -> None:
        with contextlib.suppress(ConnectionError):  # that it is gone, and why, the next answer says
            wire.send(self._channel, content)

    def _receive(self) -> Any:
        if self._failure is None:
            try:
                received = wire.receive(self._channel)
            except wire.ClosedError:
                received = self._death()
            if not isinstance(received, BaseException):
                return received
            self._failure = received
        raise self._failure

    def _death(self) -> InfrastructureError:
        try:
            code = self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            return InfrastructureError(f"the data reader (process {self.pid}) closed its connection and hangs")
        return InfrastructureError(f"the data reader (process {self.pid}) {_cause(code)}")


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "was killed (SIGKILL), as systems do when memory runs out: give the job more memory, "
            "or set data.reader_processes to 0 or 1"
        )
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _start(theirs: socket.socket) -> subprocess.Popen[bytes]:
    number = theirs.fileno()
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", BOOT, str(number), json.dumps(sys.path)],
            stdin=subprocess.DEVNULL,
            pass_fds=[number],
            # Ctrl-C goes to the foreground's process group; the rank answers it, and a reader must go on until then.
            start_new_session=True,
        )
    except OSError as error:
        raise InfrastructureError(f"no process could be started to read the data: {error}") from error


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    process.kill()  # it has nothing to save
    process.wait()
