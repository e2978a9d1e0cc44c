"""The driver of `ftlaunch prepare` on a node of the cluster that it was submitted to: `python .../drive driver.json
ADDRESS [--kept [WHY]]`; WHY: the one before it ended, for this reason. What that one has made is kept."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from ..cluster.base import CodeFolder, Demand, Endpoint
from ..cluster.joined import Joined
from ..cluster.restarts import BEGUN, LEFT, LEFT_EARLY, SPOKE
from ..recipes.errors import InfrastructureError, Interrupted
from .cli import guarded
from .cli_recipe import remember
from .handover import unpack
from .prepare_shards import make_shards

RESTARTS = "restarts"
"""File beside the driver's with the number of those before it that made nothing new."""


def main() -> int:
    """Drive; the exit code (see `cluster/restarts.py`)."""
    file, address, *kept = Path(sys.argv[1]), *sys.argv[2:]
    driven = Driven(file, address, kept[1] if len(kept) > 1 else "")
    driven.listen()
    # Whoever started this may have held them back; SIGTERM it holds back where everybody gets it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGINT})
    code = driven.answer(guarded(driven.run))
    file.with_name(SPOKE).touch()
    return code


@dataclass
class Driven:
    """One submitted preparation, with what it is told (see `prepare_submit.py`). `again`: why it is begun again."""

    file: Path
    address: str
    again: str
    _has_made: bool = False
    _ends: bool = False
    _leaves: bool = False

    def listen(self) -> None:
        """Be asked to end."""
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        """SIGUSR1: the nodes are wanted back, to go on later."""
        self._leaves = self._leaves or number == signal.SIGUSR1
        if not self._ends:
            self._ends = True
            raise KeyboardInterrupt

    def run(self) -> int:
        """All shards."""
        job = json.loads(self.file.read_text())
        self._spend(job["max_restarts"])
        loaded = unpack(job["loaded"])
        remember(loaded)
        cluster = _Joined(self.address, Demand(**job["demand"]), self.listen)
        make_shards(loaded, job["to"], cluster, Console(width=job["columns"]), self._made)
        return 0

    def _spend(self, limit: int) -> None:
        """Raises InfrastructureError where that has happened too often."""
        if not self.again:
            return
        counted = self.file.with_name(RESTARTS)
        used = int(counted.read_text()) + 1 if counted.exists() else 1
        if used > limit:
            raise InfrastructureError(f"{self.again}; it is not started again (cluster.max_restarts)")
        counted.write_text(str(used))

    def _made(self) -> None:
        """A shard that was not there: who got so far may be begun again as if for the first time."""
        if not self._has_made:
            self._has_made = True
            self.file.with_name(BEGUN).touch()
            self.file.with_name(RESTARTS).unlink(missing_ok=True)

    def answer(self, code: int) -> int:
        """The exit code: one that has left its nodes with something done is begun again as often as it takes."""
        if not self._leaves or code != Interrupted.exit_code:
            return code
        return LEFT if self._has_made else LEFT_EARLY


class _Joined(Joined):
    """`then` is called when this process is connected: Ray takes SIGTERM for itself."""

    def __init__(self, address: str, demand: Demand, then: Callable[[], None]) -> None:
        super().__init__(address, demand)
        self._then = then

    def up(self, code: CodeFolder) -> Endpoint:
        endpoint = super().up(code)
        self._then()
        return endpoint
