"""Being asked to stop."""

from __future__ import annotations

import os
import signal
from unittest.mock import Mock

import pytest

from ftlaunch.launcher.supervisor import _interrupts_to, _Training

CONNECTING = {"kind": "phase", "phase": "connecting"}
WAITS = {"kind": "message", "text": "waiting for nodes", "waits": True}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_its_handler_comes_back(number):
    """SIGTERM too: schedulers send it before they kill, and a run shall have saved by then."""
    before, asked = signal.getsignal(number), []
    with _interrupts_to(lambda: asked.append(number)):
        os.kill(os.getpid(), number)
    assert asked == [number]
    assert signal.getsignal(number) == before


def training(*events: dict[str, object]) -> _Training:
    """A run of which so much has been heard."""
    made = _Training(Mock(), Mock(), Mock(), _control=Mock())
    for event in events:
        made._note(event)
    return made


def test_ranks_that_are_there_are_asked_once_to_save():
    run = training(WAITS, CONNECTING, {"kind": "message", "text": "all ranks are started again", "waits": False})
    run._on_interrupt()
    run._control.request_stop.remote.assert_called_once_with()
    with pytest.raises(KeyboardInterrupt):
        run._on_interrupt()


def test_where_nodes_are_waited_for_nobody_has_to_ask_twice():
    late = {"kind": "step", "step": 7}  # of ranks that were lost
    for run in (training(), training(CONNECTING, WAITS), training(CONNECTING, WAITS, late)):
        with pytest.raises(KeyboardInterrupt):
            run._on_interrupt()


def test_a_run_that_was_asked_to_stop_does_not_wait_for_nodes():
    run = training(CONNECTING)
    run._on_interrupt()
    with pytest.raises(KeyboardInterrupt):
        run._note(WAITS)
