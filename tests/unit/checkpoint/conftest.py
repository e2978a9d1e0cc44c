"""Ranks as threads, and fragmentations of tensors: hundreds of cases without a process."""

from __future__ import annotations

import itertools
import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from ftlaunch.distributed.checkpoint.fragments import Fragment, TensorSpec
from ftlaunch.distributed.checkpoint.layout import DTYPE_OF_TORCH
from ftlaunch.distributed.checkpoint.peers import Peers

STUCK_S = 60


class Hub:
    """What thread ranks share. A send ends only when its receive has taken the data, as with gloo's large ones."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.values = [None] * size
        self.channels = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
        self.sent_bytes = 0


@dataclass(frozen=True)
class Sending:
    taken: threading.Event

    def wait(self):
        assert self.taken.wait(STUCK_S), "a send was never received"


@dataclass(frozen=True)
class Receiving:
    channel: queue.Queue
    target: torch.Tensor

    def wait(self):
        data, taken = self.channel.get(timeout=STUCK_S)
        assert data.shape == self.target.shape
        self.target.copy_(data)
        taken.set()


@dataclass(frozen=True)
class ThreadPeers(Peers):
    hub: Hub = field(default_factory=lambda: Hub(1))

    def gather(self, value):
        self.hub.values[self.rank] = value
        self.hub.barrier.wait(STUCK_S)
        values = list(self.hub.values)
        self.hub.barrier.wait(STUCK_S)
        return values

    def send(self, data, to):
        taken = threading.Event()
        self.hub.channels[self.rank, to].put((data, taken))
        self.hub.sent_bytes += len(data)
        return Sending(taken)

    def receive(self, data, source):
        return Receiving(self.hub.channels[source, self.rank], data)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), DTYPE_OF_TORCH[str(tensor.dtype).removeprefix("torch.")])


def split(numel: int, size: int, draw: random.Random) -> list[list[tuple[int, int]]]:
    """Every element to at least one rank, in random ranges; now and then a rank has more than its share."""
    cuts = sorted({0, numel, *(draw.randint(0, numel) for _ in range(draw.randint(0, 2 * size)))})
    held = [[] for _ in range(size)]
    for start, stop in itertools.pairwise(cuts):
        for rank in draw.sample(range(size), draw.choice([1, 1, 1, min(2, size), size])):
            held[rank].append((start, stop))
    return held


def fragment(name: str, tensor: torch.Tensor, ranges) -> Fragment:
    flat = tensor.reshape(-1)
    values = torch.cat([flat[start:stop] for start, stop in ranges]) if ranges else flat[:0]
    if name[-1] in "13579":  # not all values lie side by side in memory
        values = torch.stack([values, values], dim=1)[:, 0]
        assert values.numel() < 2 or not values.is_contiguous()
    return Fragment(spec_of(name, tensor), tuple(ranges), values)


def fragment_all(tensors, size: int, seed: int) -> list[list[Fragment]]:
    """By rank: fragments of all tensors."""
    draw = random.Random(seed)
    held = {name: split(tensor.numel(), size, draw) for name, tensor in tensors.items()}
    return [[fragment(name, tensor, held[name][rank]) for name, tensor in tensors.items()] for rank in range(size)]


def run_threads(size: int, work):
    """`work(peers)` on every rank; the results, or the exceptions, by rank."""
    hub = Hub(size)

    def one(rank):
        try:
            return work(ThreadPeers(rank, size, hub=hub))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size))), hub


@pytest.fixture(scope="session")
def threads():
    return run_threads


@pytest.fixture(scope="session")
def fragmented():
    return fragment_all


@pytest.fixture(scope="session")
def specs():
    return lambda tensors: [spec_of(name, tensor) for name, tensor in tensors.items()]
