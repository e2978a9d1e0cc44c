"""The driver of `ftlaunch prepare` on a node of the cluster that it was submitted to: `python .../drive driver.json
ADDRESS [--kept [WHY]]`. Whatever ended the one before it, this one goes on: shards that are there are kept."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from ..cluster.base import Demand
from ..cluster.joined import Joined
from ..cluster.restarts import LEFT, LEFT_EARLY, SPOKE
from ..recipes.errors import Interrupted
from .cli import guarded
from .cli_recipe import remember
from .handover import unpack
from .prepare_shards import make_shards


def main() -> int:
    """Drive; the exit code (see `cluster/restarts.py`)."""
    file = Path(sys.argv[1])
    driven = Driven(file, sys.argv[2])
    asked = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}
    for number in asked:
        signal.signal(number, driven.end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, asked)  # whoever started this may have held them back
    code = driven.answer(guarded(driven.run))
    file.with_name(SPOKE).touch()
    return code


@dataclass
class Driven:
    """One submitted preparation, with what it is told (see `prepare_submit.py`)."""

    file: Path
    address: str
    _made: int = 0
    _leaves: bool = False

    def end(self, number: int, _frame: FrameType | None) -> None:
        """SIGUSR1: the nodes are wanted back, to go on later."""
        self._leaves = self._leaves or number == signal.SIGUSR1
        raise KeyboardInterrupt

    def run(self) -> int:
        """All shards."""
        job = json.loads(self.file.read_text())
        loaded = unpack(job["loaded"])
        remember(loaded)
        cluster = Joined(self.address, Demand(**job["demand"]))
        make_shards(loaded, job["to"], cluster, Console(width=job["columns"]), self._made_one)
        return 0

    def _made_one(self) -> None:
        self._made += 1

    def answer(self, code: int) -> int:
        """The exit code: one that has left its nodes with something done is begun again as often as it takes."""
        if not self._leaves or code != Interrupted.exit_code:
            return code
        return LEFT if self._made else LEFT_EARLY
