"""Being asked to stop."""

from __future__ import annotations

import os
import signal

import pytest

from ftlaunch.launcher.supervisor import _interrupts_to


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_its_handler_comes_back(number):
    """SIGTERM too: schedulers send it before they kill, and a run shall have saved by then."""
    before, asked = signal.getsignal(number), []
    with _interrupts_to(lambda: asked.append(number)):
        os.kill(os.getpid(), number)
    assert asked == [number]
    assert signal.getsignal(number) == before
