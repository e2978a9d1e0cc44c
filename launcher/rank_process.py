"""The process of a rank under Ray Train (as of 2.60), as it is before it knows what it will train."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from .imports import import_all

RANK_IMPORTS = (
    "ftlaunch.distributed.entry",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
    "transformers.conversion_mapping",
)
"""What every rank imports sooner or later."""


class WarmUp:
    """Imports beside everything else; joined before a rank's program begins, because transformers does not bear being
    imported by two threads."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.stands_by = False
        """Whether this process was started before it was needed."""
        self.given_s: float | None = None
        """When one that stood by was given work, in seconds since 1970."""

    def start(self, more: Sequence[str]) -> None:
        """What every rank imports, and `more`, as far as that is there."""
        self._thread = threading.Thread(target=_import, args=(more,), daemon=True)
        self._thread.start()

    def join(self) -> None:
        """There is work: wait for it, where it was started."""
        if self.stands_by:
            self.given_s = time.time()
        if self._thread is not None:
            self._thread.join()


def _import(more: Sequence[str]) -> None:
    import_all(RANK_IMPORTS)
    for name in more:
        with suppress(Exception):  # whoever needs it is told when it is imported again
            import_module(name)


warm_up = WarmUp()
"""In a rank's process."""


def loaded() -> list[str]:
    """Modules that this process has imported, in their order; without those of Ray, which import each other: what Ray
    imports of its own meanwhile, in another thread, would find them half made."""
    found = [name for name, module in list(sys.modules.items()) if getattr(module, "__spec__", None) is not None]
    return [name for name in found if name.partition(".")[0] != "ray"]


class RayTrainWorkerWarmingUp(RayTrainWorker):  # type: ignore[misc]
    """Begins with the slow imports of a rank while Ray Train is still setting up."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        warm_up.start(more)
        super().__init__()
