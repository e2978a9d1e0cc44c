"""The touches of Ray's inside (as of 2.60) that let a local cluster start without processes that nobody asks.

`ray.init` also starts a dashboard's server (with `include_dashboard=False` a smaller one, and waits for it), the
autoscaler's monitor, a monitor that carries workers' output to the driver, an agent that reports to the dashboard, and
one that makes runtime environments; only when the agents answer are workers started. All are Python processes of half
a second to a second, on the way of a run that shares a few cores with them.

A local run has no dashboard and no autoscaler, its workers' output stays in files, and its actors name no runtime
environment (with one, they would wait for ever: see `launcher/ray_train_compat.py`).
"""

from __future__ import annotations

import ray._private.services
from ray._private import ray_constants
from ray._private.node import Node
from ray._raylet import (  # type: ignore[attr-defined]
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    persist_port,
)

AGENTS = (ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT)
AGENTS_PORTS = (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
)
NO_PORT = -1

IDLE = ["/bin/sh", "-c", "exec cat"]
"""An agent that does nothing until the raylet, which would not run without agents, ends its pipe (`PIPED_AGENTS` in
`local.py`). The arguments that follow are lost on the shell."""

_python_command = ray._private.services._build_python_executable_command_memory_profileable


def start_only_what_runs_work() -> None:
    """For this process, which starts no other kind of cluster."""
    Node.start_api_server = Node.start_monitor = _start_nothing
    Node.start_log_monitor = _answer_for_the_agents  # called right before the raylet is started
    ray._private.services._build_python_executable_command_memory_profileable = _command


def _start_nothing(_node: Node, **_settings: object) -> None:
    pass


def _answer_for_the_agents(node: Node) -> None:
    for name in AGENTS_PORTS:
        persist_port(node.get_session_dir_path(), node.node_id, name, NO_PORT)


def _command(component: str, session_dir: str, *others: object) -> list[str]:
    command: list[str] = IDLE if component in AGENTS else _python_command(component, session_dir, *others)
    return command
