"""Looks after the driver of a run that is driven from here: it runs in a process of its own, and is started again when
it is killed, or when Ray on this machine ends under it. What looks after it does nothing else, so that nothing happens
to it: it imports neither Ray nor torch.

On hosts of an `ssh` cluster `cluster/host_keeper.py` does the same, with the same exit code.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from ..cluster.restarts import QuickEnds, final, why_again
from ..recipes.errors import Interrupted

QUICK_S = 5.0
"""A driver that is killed sooner has not come to write into the run directory."""

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Beginning:
    """How a driver was started. `launch`: the command that it is part of. `again`: None for the first one, else why the
    one before ended; empty: that one has written it down itself. `is_kept`: somebody would start it again. `give_back`:
    takes the addresses of nodes that are not fit, so that it is started again on others; None: no others can be had."""

    launch: str
    again: str | None = None
    is_kept: bool = False
    give_back: Callable[[Sequence[str]], object] | None = None


def new_launch() -> str:
    """Tells one command from another."""
    return secrets.token_hex(4)


def keep(drive: Callable[[Beginning], int]) -> int:
    """Drive; the exit code. It returns twice: in the process that was forked to drive, and here with the code of the
    last of them."""
    beginning, ends = Beginning(new_launch(), is_kept=True), QuickEnds(QUICK_S)
    while True:
        ends.started()
        heard, spoken = os.pipe()
        child = os.fork()
        if child == 0:
            _live_as_long_as_parent()
            return _speaking(spoken, drive, beginning)
        os.close(spoken)
        code, stopped = _wait(child)
        os.set_blocking(heard, False)  # what the driver has started may hold the other end
        again = None if stopped else why_again(code, spoke=_read(heard) != b"")
        os.close(heard)
        if stopped and code < 0:
            return Interrupted.exit_code  # it was asked to end, and has
        if again is None or not ends.ended():
            return final(code)
        beginning = Beginning(beginning.launch, again, is_kept=True)


def _speaking(spoken: int, drive: Callable[[Beginning], int], beginning: Beginning) -> int:
    try:
        return drive(beginning)
    finally:
        os.write(spoken, b".")


def _read(heard: int) -> bytes:
    try:
        return os.read(heard, 1)
    except BlockingIOError:
        return b""


def _live_as_long_as_parent() -> None:
    parent = os.getppid()
    # A group of its own: Ctrl-C comes through the parent, once, whether from a terminal or from `kill`.
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _wait(child: int) -> tuple[int, bool]:
    """The child's exit code, and whether it was asked to stop. Signals are passed on."""
    asked = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        os.kill(child, number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return os.waitstatus_to_exitcode(status), bool(asked)
