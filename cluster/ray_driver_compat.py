"""The touch of Ray's inside (as of 2.60) that keeps its services' words out of a run's output.

Beside workers' output (`log_to_driver`) a driver prints whatever the services of its cluster report: where a node is
lost, twenty lines from the log of its raylet. What has happened is said in one line by whoever looks after the run, and
what ends it reaches us as an error; Ray's logs have the rest.
"""

from __future__ import annotations

from typing import Any


def say_nothing_of_services() -> None:
    """For the clusters that this process connects to from now on."""
    from ray._private import worker

    worker.listen_error_messages = _listen_to_nothing


def _listen_to_nothing(_worker: Any, _threads_stopped: Any) -> None:
    pass
