"""Where a rank's steps come from: readers in the background, in this process or in others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Protocol

from .parts import MicroBatch, Part, PartReader, PartSpec, States

AHEAD_STEPS = 16
"""Finished steps that wait for the loop, at most; small steps make up for stalls by their number."""

AHEAD_BYTES = 64 * 2**20
"""Bytes of finished steps that wait for the loop on one rank, at most; one step always may."""


class Feed(Protocol):
    """One reader's parts of the steps, read ahead. The same parts in the same order whatever the feed."""

    def begin(self, states: States | None) -> None:
        """Start reading: at the beginning, or where `states` were taken. Once; raises UserError."""
        ...

    def next_part(self) -> Part:
        """The next step's part; raises what the reader raised, every time it is asked again."""
        ...

    def initial_states(self) -> States | bytes:
        """The states before the first part, as in `Part.states`; before the first `next_part`."""
        ...

    def close(self) -> None:
        """Stop reading."""
        ...


def nbytes_of(part: Part) -> int:
    """Bytes of a part's arrays."""
    return sum(_nbytes(micro) for micro in part.micro_batches)


def _nbytes(micro: MicroBatch) -> int:
    return micro.batch.input_ids.nbytes + micro.batch.position_ids.nbytes + micro.batch.targets.nbytes


class Room:
    """Bytes and steps that may still wait; `take` blocks while there is no room. One step always fits."""

    def __init__(self, max_bytes: int, max_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.waited_s = 0.0
        """How long the last `take` waited."""
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_steps = max_steps
        self._bytes = 0
        self._steps = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> bool:
        """Wait for room for a step; False once closed."""
        with self._changed:
            self.waited_s = 0.0
            if not self._fits(nbytes):
                began = self._clock()
                self._changed.wait_for(lambda: self._closed or self._fits(nbytes))
                self.waited_s = self._clock() - began
            self._bytes += nbytes
            self._steps += 1
            return not self._closed

    def give_back(self, nbytes: int) -> None:
        """A step has been taken away."""
        with self._changed:
            self._bytes -= nbytes
            self._steps -= 1
            self._changed.notify()

    def close(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        return self._steps == 0 or (self._steps < self._max_steps and self._bytes + nbytes <= self._max_bytes)


def read_ahead(batches: Generator[MicroBatch, None, None]) -> Iterator[MicroBatch]:
    """The same batches, made in a thread while earlier ones are used. Raises what making them raises."""
    room = Room(AHEAD_BYTES, AHEAD_STEPS)
    made: queue.SimpleQueue[MicroBatch | BaseException | None] = queue.SimpleQueue()

    def make() -> None:
        try:
            with closing(batches):
                for micro in batches:
                    if not room.take(_nbytes(micro)):
                        return
                    made.put(micro)
            made.put(None)
        except BaseException as error:  # handed to whoever asks, who raises it
            made.put(error)

    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (micro := made.get()) is not None:
            if isinstance(micro, BaseException):
                raise micro
            room.give_back(_nbytes(micro))
            yield micro
    finally:
        room.close()
        thread.join()


class ThreadFeed:
    """A reader in a thread of this process: nothing to start, but it shares the interpreter with the loop."""

    def __init__(self, spec: PartSpec, *, ahead_bytes: int = AHEAD_BYTES) -> None:
        self._reader: PartReader = spec.open()
        self._room = Room(ahead_bytes, AHEAD_STEPS)
        self._queue: queue.SimpleQueue[Part | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read_ahead, name="data-stream", daemon=True)
        self._failure: BaseException | None = None

    def begin(self, states: States | None) -> None:
        if states is not None:
            self._reader.restore(states)
        self._initial = self._reader.states()
        self._thread.start()

    def next_part(self) -> Part:
        if self._failure is not None:
            raise self._failure
        part = self._queue.get()
        if isinstance(part, BaseException):
            self._failure = part
            raise part
        self._room.give_back(nbytes_of(part))
        return part

    def initial_states(self) -> States:
        return self._initial

    def close(self) -> None:
        self._room.close()
        if self._thread.is_alive():
            self._thread.join()
        self._reader.close()

    def _read_ahead(self) -> None:
        try:
            while True:
                part = self._reader.next_part()
                if not self._room.take(nbytes_of(part)):
                    return
                self._queue.put(part._replace(reader_idle_s=self._room.waited_s))
        except BaseException as error:  # handed to the loop, which raises it
            self._queue.put(error)
