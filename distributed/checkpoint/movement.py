"""Bring every piece of a checkpoint's parts from the rank that supplies it to the rank that writes it.

Besides what its sources yield a rank holds a few chunks, never a tensor of somebody else and never a model. Messages
are on their way while earlier ones are written.

Why it cannot deadlock: all ranks walk the same list of pieces in the same order, and waiting for a piece depends on
earlier pieces only. Take the first piece that is not done: its senders are kept from sending only by transfers of
earlier pieces, which are done; its writer is kept from receiving only by earlier pieces and by its own storage, which
waits for no rank. So it gets done. A rank whose source or storage failed keeps walking (it sends zeros, it drops what
it receives) until all ranks can learn of the failure together; nothing it wrote is ever committed. A rank that died
breaks its connections, which is an error on those it talks to. Their processes must end on that error (or wait for
the group's time-out), which brings it to the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import NamedTuple, Protocol

import torch

from .exchange import Segment, clip
from .fragments import Fragment
from .layout import StoredFile, num_bytes
from .parts import Held, Part, PartPlan, walk
from .peers import Peers, Transfer

PENDING_SEND_BYTES = 16 * 2**20
"""How far a rank may run ahead of the writers it sends to. What had to be cast or copied from a device is memory of
its own."""

PIECES_AHEAD = 3
"""Pieces that are received at once: one message may wait for its sender while others come in."""


class Sink(Protocol):
    """What writes this rank's blocks of files. Pieces of a block come in the order of the file."""

    def room(self, file: StoredFile, offset: int, length: int) -> torch.Tensor:
        """Memory for the bytes of a file from `offset` on; waits for storage where it is behind, and for no rank."""
        ...

    def put(self, file: StoredFile, offset: int, data: torch.Tensor) -> None:
        """Write what `room` gave the memory for. Never raises: failures are told at the end."""
        ...


@dataclass
class Movement:
    """Parts on their way, into the sink of each rank."""

    peers: Peers
    sink: Sink
    failures: list[Exception]
    _sent: deque[tuple[Transfer, int]] = field(default_factory=deque)
    _sent_bytes: int = 0
    _arriving: deque[_Arrival] = field(default_factory=deque)

    def run(self, parts: Sequence[Part], *, side_by_side: bool) -> None:
        """Move all of them; side by side, so that writers of different parts work at the same time, or one by one."""
        fragments = _side_by_side(parts, self.failures) if side_by_side else _one_by_one(parts, self.failures)
        for part, position, fragment in fragments:
            self._move(part.plan, position, Held(fragment))
        while self._arriving:
            self._finish()
        self._wait_for_sends(0)

    def _move(self, plan: PartPlan, position: int, held: Held) -> None:
        file, place = plan.files.places[held.spec.name]
        if file.name in plan.linked:
            return
        cut, segments = plan.cuts[file.name], plan.segments[position]
        for start, stop in cut.pieces(place, plan.chunk_bytes):
            offset = place.start + start * held.itemsize
            writer, pieces = cut.writer(offset), clip(segments, start, stop)
            if writer == self.peers.rank:
                while len(self._arriving) >= PIECES_AHEAD:
                    self._finish()
                room = self.sink.room(file, offset, (stop - start) * held.itemsize)
                self._arriving.append(_receive(file, offset, room, pieces, held, self.peers))
            elif mine := [piece for piece in pieces if piece.rank == self.peers.rank]:
                self._send(held.join(mine), writer)

    def _finish(self) -> None:
        arrival = self._arriving.popleft()
        arrival.wait()
        self.sink.put(arrival.file, arrival.offset, arrival.room)

    def _send(self, data: torch.Tensor, to: int) -> None:
        self._sent.append((self.peers.send(data, to), len(data)))
        self._sent_bytes += len(data)
        self._wait_for_sends(PENDING_SEND_BYTES)

    def _wait_for_sends(self, most: int) -> None:
        while self._sent_bytes > most:
            transfer, size = self._sent.popleft()
            transfer.wait()
            self._sent_bytes -= size


# --- one piece ------------------------------------------------------------------------------------------------------


class _Message(NamedTuple):
    """From one rank: its pieces, one after the other."""

    transfer: Transfer
    data: torch.Tensor
    targets: list[torch.Tensor]


class _Arrival(NamedTuple):
    """A piece of a file on its writer, which is whole when all messages are there."""

    file: StoredFile
    offset: int
    room: torch.Tensor
    messages: list[_Message]

    def wait(self) -> None:
        for transfer, data, targets in self.messages:
            transfer.wait()
            if len(targets) > 1:
                ends = accumulate(map(len, targets))
                for target, end in zip(targets, ends, strict=True):
                    target.copy_(data[end - len(target) : end])


def _receive(
    file: StoredFile, offset: int, room: torch.Tensor, pieces: Sequence[Segment], held: Held, peers: Peers
) -> _Arrival:
    """Begin to assemble a piece in `room`: one message from each rank that has some of it."""
    size, first = held.itemsize, pieces[0].start
    places = {piece: room[(piece.start - first) * size : (piece.stop - first) * size] for piece in pieces}
    messages = []
    for rank in dict.fromkeys(piece.rank for piece in pieces if piece.rank != peers.rank):
        targets = [place for piece, place in places.items() if piece.rank == rank]
        data = targets[0] if len(targets) == 1 else torch.empty(sum(map(len, targets)), dtype=torch.uint8)
        messages.append(_Message(peers.receive(data, rank), data, targets))
    for piece, place in places.items():
        if piece.rank == peers.rank:
            held.copy(piece.start, piece.stop, place)
    return _Arrival(file, offset, room, messages)


# --- the order of all ranks -----------------------------------------------------------------------------------------

Walk = Iterator[tuple[Part, int, Fragment]]


def _one_by_one(parts: Sequence[Part], failures: list[Exception]) -> Walk:
    return chain.from_iterable(_walk(part, failures) for part in parts)


def _walk(part: Part, failures: list[Exception]) -> Walk:
    return ((part, position, fragment) for position, fragment in walk(part.source, part.plan, failures))


def _side_by_side(parts: Sequence[Part], failures: list[Exception]) -> Walk:
    """The next tensor is always one of the part that has come least far, by its share of bytes."""
    walks = [_walk(part, failures) for part in parts]
    totals = [max(1, _total_bytes(part.plan)) for part in parts]
    done = [0] * len(parts)
    left = set(range(len(parts)))
    while left:
        number = min(left, key=lambda one: (done[one] / totals[one], one))
        following = next(walks[number], None)
        if following is None:
            left.remove(number)
            continue
        done[number] += num_bytes(following[2].spec)
        yield following


def _total_bytes(plan: PartPlan) -> int:
    return sum(map(num_bytes, plan.specs))
