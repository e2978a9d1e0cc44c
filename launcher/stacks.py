"""The stacks of a rank, taken while it runs. `take_stacks` is called in the rank's own process, whose training is in a
thread; `look_and_end` beside it on its node, for one that does not answer."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

TRAINING = "TrainingThread"
"""Begins the name that Ray Train gives the thread in which a rank's program runs."""

DUMP_S = 1.0
"""For a process to write its stacks when a signal asks it to."""


@dataclass(frozen=True)
class Call:
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f'  File "{self.file}", line {self.line}, in {self.function}'


@dataclass(frozen=True)
class Stack:
    """One thread, the innermost call last."""

    thread: str
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        return "\n".join([f"Thread {self.thread}:", *map(str, self.calls)])


def take_stacks() -> list[Stack]:
    """All threads of this process, the training first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    mine = threading.get_ident()
    stacks = [
        Stack(names.get(ident, str(ident)), tuple(_calls(frame)))
        for ident, frame in sys._current_frames().items()
        if ident != mine
    ]
    return sorted(stacks, key=lambda stack: not stack.thread.startswith(TRAINING))


def _calls(frame: FrameType | None) -> list[Call]:
    calls = []
    while frame is not None:
        calls.append(Call(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname))
        frame = frame.f_back
    return calls[::-1]


# --- a process that does not answer -----------------------------------------------------------------------------------


def _dump(logs: Path, pid: int) -> Path:
    return logs / f"ftlaunch-stacks-{pid}.txt"


def dump_on_signal(logs: Path) -> None:
    """Have this process write its stacks into the folder of Ray's logs when it gets SIGUSR2, even while it is busy in a
    library's own code."""
    with suppress(OSError):  # without it a hang is told with less detail
        file = _dump(logs, os.getpid()).open("w")  # stays open: the handler writes to its descriptor
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def look_and_end(logs: Path, pid: int) -> str:
    """What can be seen of another process of this node: its state, and its stacks if it still writes them. It is ended
    afterwards, because a process that is stopped cannot be asked to."""
    said = [_state(pid)]
    path = _dump(logs, pid)
    with suppress(OSError):
        os.kill(pid, signal.SIGUSR2)
        deadline_s = time.monotonic() + DUMP_S
        while not (text := path.read_text()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        said.append(text)
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    return "\n".join(filter(None, said))


def _state(pid: int) -> str:
    """In words, from /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "the process is gone"
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    state = fields.get("State", "").strip()
    return f"the process is in state {state}" if state else "the process is there"
