"""The touches of Ray's inside (as of 2.60) that let a local cluster start without processes that nobody asks.

`ray.init` also starts a dashboard's server (with `include_dashboard=False` a smaller one, and waits for it), the
autoscaler's monitor, a monitor that carries workers' output to the driver, an agent that reports to the dashboard, and
one that makes runtime environments; only when the agents answer are workers started. All are Python processes of half
a second to a second, on the way of a run that shares a few cores with them.

A local run has no dashboard and no autoscaler, its workers' output stays in files, and its actors name no runtime
environment (with one, they would wait for ever: see `launcher/ray_train_compat.py`).
"""

from __future__ import annotations

from typing import Any

AGENTS = ("dashboard_agent", "runtime_env_agent")
AGENTS_PORTS = ("dashboard_agent_listen_port", "metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
NO_PORT = -1

IDLE = ["/bin/sh", "-c", "exec cat"]
"""An agent that does nothing until the raylet, which would not run without agents, ends its pipe (`PIPED_AGENTS` in
`local.py`). The arguments that follow are lost on the shell."""


def start_only_what_runs_work() -> None:
    """For this process, which starts no other kind of cluster."""
    from ray._private import services
    from ray._private.node import Node

    Node.start_api_server = Node.start_monitor = _start_nothing
    Node.start_log_monitor = _answer_for_the_agents  # called right before the raylet is started
    python_command = services._build_python_executable_command_memory_profileable

    def command(component: str, *arguments: Any) -> Any:
        return IDLE if component in AGENTS else python_command(component, *arguments)

    services._build_python_executable_command_memory_profileable = command


def _start_nothing(_node: Any, **_settings: Any) -> None:
    pass


def _answer_for_the_agents(node: Any) -> None:
    """The ports that the raylet waits for."""
    from ray._raylet import persist_port  # type: ignore[attr-defined]

    for name in AGENTS_PORTS:
        persist_port(node.get_session_dir_path(), node.node_id, name, NO_PORT)
