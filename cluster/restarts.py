"""When what drives a run, or carries it, is started again after its end; the same on this machine and on a node. Who
drives draws on the run's budget; here it is only seen to that nothing which ends at once is started for ever."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

AGAIN = 75
"""Exit code of a driver that asks to be started again (EX_TEMPFAIL of sysexits.h). No user ever sees it."""

LEFT, LEFT_EARLY = 76, 77
"""Exit codes of a driver that was asked to leave its nodes (by SIGUSR1), and has: the run goes on when it gets nodes
again. The second: before there was a newer checkpoint."""

ELSEWHERE = 79
"""Exit code of a driver that has found nodes unfit and asks for others in their place; it names them in UNFIT."""

UNFIT = "unfit"
"""File in its job's folder with the addresses of unfit nodes, a line each."""

EARLY = "its nodes were wanted back before there was a newer checkpoint"
"""Why a run that left so is on its budget when it begins again."""

SPOKE = "spoke"
"""File in its job's folder by which a driver shows that it has come to an end of its own."""

BEGUN = "begun"
"""File there by which a driver shows that the run has begun: whatever brought it there is counted in the run directory
by now, and what ends it will be."""

MAX_QUICK = 3


def why_again(code: int, *, spoke: bool) -> str | None:
    """Why a driver that ended with this code (negative: by a signal) is started again; empty: it has written that down
    itself. None: it is not. `spoke`: it came to an end of its own; when Ray ends, Ray ends its driver's process."""
    if code == AGAIN:
        return ""
    if code < 0:
        return f"the driver was killed ({signal.Signals(-code).name})"
    return None if spoke else f"Ray has ended, and its driver with it (exit code {code})"


def final(code: int) -> int:
    """What a shell is told of it when it is not started again."""
    return 2 if code == AGAIN else 128 - code if code < 0 else code


class QuickEnds:
    """Counts ends that follow a start within `quick_s`. `clock` in seconds."""

    def __init__(self, quick_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._quick_s, self._clock = quick_s, clock
        self._started_s, self._count = clock(), 0

    def started(self) -> None:
        """From now on."""
        self._started_s = self._clock()

    def ended(self) -> bool:
        """It has ended; whether it may be started again."""
        self._count = self._count + 1 if self._clock() - self._started_s < self._quick_s else 0
        return self._count <= MAX_QUICK
