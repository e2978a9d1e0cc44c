"""The process group, and the few words that ranks exchange outside the strategies.

Control traffic has a gloo group of its own, so that it needs no GPU, and so that a long save or a slow reader on one
rank is not mistaken for a hang of the training collectives.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not among its exported names

from .checkpoint.peers import Peers
from .world import World

T = TypeVar("T")

TRAINING_TIMEOUT = timedelta(minutes=10)
CONTROL_TIMEOUT = timedelta(minutes=60)
"""A first read of a large index may keep one rank busy this long."""

SAVE_TIMEOUT = timedelta(minutes=60)
"""Ranks that save wait for each other's storage, over a slow link too."""


LISTEN_BACKLOG = 4096
"""Ranks that may knock at once."""


@dataclass(frozen=True)
class Group:
    """All ranks of a run, for control."""

    world: World
    peers: Peers

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all ranks, in fp64: counts are exact up to 2^53."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world.size > 1:
            dist.all_reduce(tensor, group=self.peers.group)
        return list(tensor.tolist())

    def act_and_sum(
        self, act: Callable[[], tuple[T, Sequence[float]]], width: int, doing: str
    ) -> tuple[T, list[float]]:
        """Everybody acts and gives `width` numbers; returns the own result and the numbers' sums.

        What one rank fails at, all ranks fail at. It costs one small reduction: only when somebody failed do the ranks
        talk about it.
        """
        result: T | None = None
        failure: Exception | None = None
        numbers: Sequence[float] = [0.0] * width
        try:
            result, numbers = act()
        except Exception as error:
            failure = error
        *sums, failures = self.sum([*numbers, failure is not None])
        if failures:
            with self.peers.together(doing):
                if failure is not None:
                    raise failure
        return result, sums  # type: ignore[return-value]

    def alike(self, act: Callable[[], T], doing: str) -> T:
        """What every rank makes for itself. What one rank fails at, all ranks fail at."""
        return self.act_and_sum(lambda: (act(), []), 0, doing)[0]

    def apart(self, timeout: timedelta) -> Peers:
        """The same ranks over a gloo group of their own, which another thread may use; collective."""
        if self.world.size == 1:
            return Peers()
        return Peers(self.world.rank, self.world.size, dist.new_group(backend="gloo", timeout=timeout))

    def for_saves(self) -> Peers:
        """The same ranks over a group that waits for storage; collective."""
        return self.apart(SAVE_TIMEOUT)

    def from_main(self, make: Callable[[], T], doing: str) -> T:
        """What rank 0 makes, on every rank. An error of rank 0 is raised on all."""
        made: T | None = None
        with self.peers.together(doing):
            if self.world.is_main:
                made = make()
        return self.peers.broadcast(made)  # type: ignore[no-any-return]


def start(world: World, rendezvous: str) -> Group:
    """Form the process groups. `rendezvous` is "env://" or "tcp://HOST:PORT"; a world of one needs none."""
    backend = "cpu:gloo,cuda:nccl" if world.device.startswith("cuda") else "gloo"
    if world.device.startswith("cuda"):
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // world.local_size)))
    if world.size == 1:
        dist.init_process_group(
            backend,
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=TRAINING_TIMEOUT,
        )
    elif rendezvous.startswith("tcp://"):
        store = _store(world, rendezvous)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TRAINING_TIMEOUT)
    else:
        dist.init_process_group(
            backend, init_method=rendezvous, rank=world.rank, world_size=world.size, timeout=TRAINING_TIMEOUT
        )
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return Group(world, Peers(world.rank, world.size, control))


def _store(world: World, rendezvous: str) -> TCPStore:
    """Where ranks find each other. torch's own listens on every interface and asks nobody for anything; this one
    listens at the address that it is reached by."""
    place = urlsplit(rendezvous)
    assert place.hostname is not None and place.port is not None, rendezvous
    listens = None
    if world.is_main:
        listener = socket.socket(socket.AF_INET6 if ":" in place.hostname else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((place.hostname, place.port))
        listener.listen(LISTEN_BACKLOG)
        listens = listener.detach()
    return TCPStore(
        place.hostname,
        place.port,
        world.size,
        is_master=world.is_main,
        timeout=TRAINING_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listens,
    )


def stop() -> None:
    """Take the process groups down."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def connected(world: World, rendezvous: str) -> Iterator[Group]:
    """The process groups of a run.

    Those of several GPUs are left as they are when this rank fails: taking NCCL's down waits for its kernels, and those
    wait for ranks that do not fail, so the reason would never be told. The end of the process takes them down.
    """
    group = start(world, rendezvous)
    try:
        yield group
    except BaseException:
        if world.size == 1 or world.device == "cpu":
            stop()
        raise
    stop()


def exit_process(code: int) -> NoReturn:
    """End this process. Not by way of the interpreter where groups are left: their destructors would wait."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
