"""One piece of work at a time beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Work:
    """Runs from now on, in a thread that does not keep the process alive."""

    def __init__(self, act: Callable[[], None], name: str) -> None:
        self._act = act
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Whether it is known by now to have failed."""
        return self._error is not None

    def wait(self) -> None:
        """Until it is done. Raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
