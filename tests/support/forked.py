"""The rank's program on forked processes: what torchrun starts, but none of them imports torch again.

For tests of what runs do. Those of how runs start and end use torchrun, or the command (`processes.py`). What a library
reads from variables when it is imported cannot be changed any more.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from harness import GRACE_S, nothing_to_collect
from processes import WAIT_S, Running

from ftlaunch.distributed import entry
from ftlaunch.distributed import group as groups


class ForkedRanks(Running):
    """Ranks of one node in `folder`, each given the arguments that torchrun would hand on."""

    def __init__(self, ranks: int, arguments: Sequence[str], folder: Path) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        self.output.touch()
        port = str(free_port())
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=_rank, args=(rank, ranks, list(arguments), folder, self.output, port), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.processes:
            with nothing_to_collect():
                process.start()

    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.is_alive()]

    def ended(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def reap(self) -> None:
        for process in self.processes:
            process.join()

    def wait(self) -> int:
        """0, or the exit code of a rank that failed."""
        deadline = time.monotonic() + WAIT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if not self.ended():
            self.kill()
            raise AssertionError(f"still running:\n{self.text}")
        return next((process.exitcode for process in self.processes if process.exitcode), 0)


def run_forked(ranks: int, arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run to the end: (exit code, output)."""
    started = ForkedRanks(ranks, arguments, folder)
    return started.wait(), started.text


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, size: int, arguments: list[str], folder: Path, output: Path, port: str) -> NoReturn:
    """What torchrun sets up, and the program."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.chdir(folder)
    printed = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    groups.exit_process(entry.main(arguments))
