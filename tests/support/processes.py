"""Runs as a user starts them: real commands in processes of their own, killed as machines are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
WAIT_S = 300.0
"""Nothing is expected to take this long; a test that waits longer has found a hang."""

POLL_S, POLL_SHARE, POLL_AT_MOST_S = 0.001, 9.0, 0.05
"""Between two looks: at the least, in looks' own time, and at the most: what is waited for may be over soon."""


def ftlaunch(*arguments: str) -> list[str]:
    """The installed command."""
    return [str(BIN / "ftlaunch"), *arguments]


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """One node's torchrun of the rank's program."""
    return [
        str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "-m", "ftlaunch.distributed.entry",
        *arguments,
    ]  # fmt: skip


def rank_alone(*arguments: str) -> list[str]:
    """The rank's program, without a launcher: a world of one."""
    return [sys.executable, "-m", "ftlaunch.distributed.entry", *arguments]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread per rank, so that runs repeat bit for bit however many ranks share the machine; and nothing that a
    test in this process has set for its own Ray."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**inherited, "OMP_NUM_THREADS": "1", **(extra or {})}


class Running(ABC):
    """What was started, and prints to a file."""

    output: Path

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace")

    @abstractmethod
    def pids(self) -> list[int]:
        """The processes that were started, without their children."""

    @abstractmethod
    def ended(self) -> bool:
        """Whether all of them are over."""

    @abstractmethod
    def reap(self) -> None:
        """Wait for the ends of processes that have been killed."""

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """Poll fast, but leave most of a core to what is waited for; False if it ended before it happened."""
        deadline = time.monotonic() + WAIT_S
        while True:
            began = time.monotonic()
            if happened():
                return True
            if self.ended():
                return happened()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"never happened:\n{self.text}")
            time.sleep(max(POLL_S, min(POLL_AT_MOST_S, POLL_SHARE * (time.monotonic() - began))))

    def kill(self) -> None:
        """SIGKILL to all of it and all descendants, at once."""
        family: list[int] = []
        for pid in self.pids():
            try:
                family += [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
            except psutil.NoSuchProcess:
                continue
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.reap()


class Command(Running):
    """A command in a session of its own, in `folder` (never the repository, whose folders would shadow packages)."""

    def __init__(self, command: Sequence[str], folder: Path, extra: Mapping[str, str] | None = None) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                list(command), cwd=folder, env=environment(extra), stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def pids(self) -> list[int]:
        return [self.process.pid]

    def ended(self) -> bool:
        return self.process.poll() is not None

    def reap(self) -> None:
        self.process.wait()

    def wait(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {WAIT_S} s:\n{self.text}") from None

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)


def run(command: Sequence[str], folder: Path, extra: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run to the end: (exit code, output)."""
    started = Command(command, folder, extra)
    return started.wait(), started.text
