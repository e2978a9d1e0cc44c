"""One rank under Ray Train: Ray's context becomes a `World`, and the rank's program runs."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import ray
import ray.train
from ray.train import BackendConfig
from ray.train.backend import Backend

from ..cluster.pod_agent import POD
from ..recipes.errors import FtlaunchError, InfrastructureError, Interrupted
from ..recipes.problems import located
from ..recipes.redact import redact
from . import spot
from .control import Ending, RayMonitor
from .failure import Preempted, Resized
from .rank_log import RankLog
from .rank_process import warm_up
from .ray_logs import logs_folder
from .stacks import dump_on_signal

if TYPE_CHECKING:
    from ..recipes.load import LoadedRecipe

RENDEZVOUS = "FTLAUNCH_RENDEZVOUS"

MOVES = {"resize": Resized, "preempted": Preempted}
"""What ranks raise when they have saved and left, by `Move.kind`."""


@dataclass(frozen=True)
class WorkerConfig:
    """What every rank is told. `folder` is where the user's relative paths begin."""

    loaded: LoadedRecipe
    control: Any
    command: tuple[str, ...]
    folder: str
    uses_gpus: bool


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker.

    A mistake of the user's is told to the launcher. Anything else is raised, and so is what lets ranks be started again
    after they have saved; `failure.py` says what is done then.
    """
    warm_up.join()
    with spot.at_work(os.environ.get(POD)):
        _work(config["worker"])


def _work(worker: WorkerConfig) -> None:
    if os.path.isdir(worker.folder):  # noqa: PTH112 - pathlib has no chdir before 3.11's contextlib one
        os.chdir(worker.folder)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if rank == 0:
        worker.control.begin.remote()
    dump_on_signal(logs_folder())
    if context.get_local_rank() == 0:
        node = ray.get_runtime_context().get_node_id()
        notice = partial(worker.control.notice.remote, node)
        spot.watch(notice, spot.cloud_of(), spot.fetching())
        spot.watch_pod(notice, os.environ.get(POD))
    ending = _logged(worker, context, RayMonitor(worker.control, speaks=rank == 0))
    if ending.outcome == "interrupted" and (move := ray.get(worker.control.why_leave.remote())):
        raise MOVES[move.kind](move.says)
    if rank == 0 or ending.outcome == "failed":
        ray.get(worker.control.end.remote(ending, rank))


def _logged(worker: WorkerConfig, context: Any, monitor: RayMonitor) -> Ending:
    """With what the rank prints, and the reason of its end, in the run directory."""
    log = RankLog()
    try:
        ending = _run(worker, context, monitor, log)
        if ending.message:
            sys.stdout.write(redact(ending.message, worker.loaded.secrets) + "\n")
        return ending
    except BaseException:
        sys.stderr.write(redact(traceback.format_exc(), worker.loaded.secrets))
        raise
    finally:
        log.close()


def _run(worker: WorkerConfig, context: Any, monitor: RayMonitor, log: RankLog) -> Ending:
    from ..distributed.entry import Job, run_rank

    world = _world(context, uses_gpus=worker.uses_gpus)
    job = Job(
        loaded=worker.loaded,
        world=world,
        rendezvous=os.environ[RENDEZVOUS],
        monitor=monitor,
        command=worker.command,
        began=warm_up.given_s,
        begun=lambda attempt: log.keep(attempt.run, attempt.number, world.rank),
    )
    try:
        return Ending(run_rank(job))
    except InfrastructureError:
        raise
    except Interrupted as error:
        return Ending("interrupted", str(error), error.exit_code)
    except FtlaunchError as error:
        return Ending("failed", located(error, worker.loaded.origins), error.exit_code)


def _world(context: Any, *, uses_gpus: bool) -> Any:
    from ..distributed.world import World

    return World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_size=context.get_local_world_size(),
        node_rank=context.get_node_rank(),
        num_nodes=max(1, context.get_world_size() // context.get_local_world_size()),
        # A node's ranks all see the GPUs of all of them, each rank's in its place.
        device=f"cuda:{context.get_local_rank()}" if uses_gpus else "cpu",
    )


@dataclass
class RendezvousConfig(BackendConfig):  # type: ignore[misc]
    """Tells every worker where rank 0 listens, and which network interface carries its Ray address. The process group
    itself is formed by the rank's program: Ray's own backend would form it before interfaces can be chosen."""

    @property
    def backend_cls(self) -> type[Backend]:
        return RendezvousBackend


class RendezvousBackend(Backend):  # type: ignore[misc]
    """See `RendezvousConfig`."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address = worker_group.execute_single(0, _free_address)
        worker_group.execute(_prepare_network, address)


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        port = listener.getsockname()[1]
    return f"tcp://[{host}]:{port}" if family == socket.AF_INET6 else f"tcp://{host}:{port}"


def _prepare_network(rendezvous: str) -> None:
    os.environ[RENDEZVOUS] = rendezvous
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)


def interface_of(address: str) -> str | None:
    """The network interface that carries an address; gloo would otherwise resolve the host name, often to loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return None
