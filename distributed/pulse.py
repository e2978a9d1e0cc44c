"""An attempt's sign of life, given in the background: a long save, a large index or a slow step must not be taken for
its end, so that somebody starts the run a second time."""

from __future__ import annotations

import threading
from contextlib import suppress

from ..recipes.errors import FtlaunchError
from .run_directory import HEARTBEAT_EVERY_S, RunDirectory


class Pulse:
    """Beats from now on until it is closed. `step`: the last one taken, for whoever wants to tell a hang."""

    def __init__(self, run: RunDirectory, attempt: int, every_s: float = HEARTBEAT_EVERY_S) -> None:
        self.step = 0
        self._run, self._attempt, self._every_s = run, attempt, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(self._every_s):
            with suppress(FtlaunchError):  # storage that fails now may be back for the next beat
                self._run.heartbeat(self._attempt, self.step)

    def close(self) -> None:
        """The last beat was given."""
        self._over.set()
        self._thread.join()
