"""Ray on this machine, started for one run and gone with it."""

from __future__ import annotations

import functools
import secrets
import shutil
import tempfile

from ..recipes.schema_cluster import LocalCluster
from .base import CodeFolder, Demand, Endpoint
from .ray_driver_compat import say_nothing_of_services
from .ray_settings import configure, quiet

PIPED_AGENTS = {"RAY_enable_pipe_based_agent_to_parent_health_check": "1"}
"""Ray's agents are given a pipe that ends with the raylet: see `ray_node_compat.py`."""

SOON_LOST = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""Seconds for which Ray's processes wait for its head when that is gone; nobody would start it again."""


ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""The node's address is 127.0.0.1, as by default on systems that Ray builds no clusters of. With any other address its
processes listen on every interface of the machine, and `ray.init` replaces this one if it is named."""

LONGEST_TEMPORARY = 20
"""Bytes of the folder for temporary files. Ray's sockets lie about 85 below it, and a socket's path may have 107."""


def _own_folder() -> str:
    """For Ray's files, closed to others. Ray opens every folder that it makes or is given to everybody, so it is given
    one within this."""
    usual = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="ft-", dir=usual if len(usual) <= LONGEST_TEMPORARY else "/tmp")  # noqa: S108


@functools.cache
def _token() -> str:
    """One for the life of this process: Ray reads it once, and would present the old one to a second cluster."""
    return secrets.token_hex(32)


class Local:
    """The `local` cluster: logical nodes on one machine."""

    def __init__(self, config: LocalCluster, demand: Demand) -> None:
        self._config, self._demand = config, demand
        self._folder: str | None = None
        # Now, not in `up`: Ray reads them when it is imported, which another thread may do before `up` comes to it.
        # A token of its own: other users of this machine can reach loopback ports.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
        configure({**token, **PIPED_AGENTS, **ON_LOOPBACK, **SOON_LOST})
        quiet()

    def problems(self) -> list[str]:
        """None that the plan has not found already: it has counted this machine's GPUs."""
        return []

    def render(self) -> str:
        demand = self._demand
        gpus = f" --num-gpus {demand.ranks}" if demand.uses_gpus else ""
        return f"ray start --head --num-cpus {demand.ranks * demand.cpus_per_rank}{gpus}"

    def up(self, _code: CodeFolder) -> Endpoint:
        import ray

        from .ray_node_compat import start_only_what_runs_work

        say_nothing_of_services()
        start_only_what_runs_work()
        demand = self._demand
        self._folder = _own_folder()
        context = ray.init(
            address="local",
            num_cpus=demand.ranks * demand.cpus_per_rank,
            num_gpus=demand.ranks if demand.uses_gpus else 0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=f"{self._folder}/r",
        )
        return Endpoint(address=context.address_info["gcs_address"])

    def down(self) -> None:
        import ray

        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
