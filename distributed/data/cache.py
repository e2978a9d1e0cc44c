"""The decoded blocks that the streams of a reader share, and the reads that bring them."""

from __future__ import annotations

import heapq
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from .block import Block
from .read_limit import MAX_READS, ReadLimit

CACHE_BYTES = 256 * 2**20
"""Decoded blocks that a reader keeps for a while beyond those its streams hold, and again as much read ahead."""

USUAL_EXPANSION = 4.0
"""Decoded bytes of a stored one, until some blocks have shown it."""

JOINED_BYTES = 2**18
"""Stored bytes of neighbouring blocks that one read brings, at most: below this a request costs more than its bytes."""


class Neighbours(Protocol):
    """How blocks that lie beside each other are read together."""

    def joins(self, block: int) -> bool:
        """Whether one read can bring a block and the next by number."""
        ...

    def read_run(self, blocks: Sequence[int]) -> list[Block]:
        """Consecutive blocks that join. Raises what reading one raises."""
        ...


@dataclass
class _Wanted:
    """A block that is not there yet. `ahead`: nobody waits for it; `part`: others serve the rest of it;
    `nbytes`: how big it will be, by guess; `due`: when it will be wanted, see `BlockCache.prefetch`."""

    block: int
    ahead: bool
    part: bool
    nbytes: int
    due: float
    started: bool = False
    future: Future[Block] = field(default_factory=Future)


class BlockCache:
    """Decoded blocks by id. A block that any stream still holds is never decoded again, and two streams that want
    the same one wait for one read.

    What somebody waits for is read first, then what is due first: streams take their steps together, so blocks that one
    of them needs later would only keep the others waiting. Reading ahead keeps to `max_bytes` of decoded blocks that
    nobody has asked for yet; a block that is larger by itself is only read once it is asked for. `stored_bytes(block)`
    is how long a block is where it lies, `read_part` how a block is read that others want too. Small `neighbours` that
    are wanted at the same time are one read.
    """

    def __init__(
        self,
        read: Callable[[int], Block],
        max_bytes: int = CACHE_BYTES,
        readers: int = MAX_READS,
        stored_bytes: Callable[[int], int] | None = None,
        read_part: Callable[[int], Block] | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        self._read = read
        self._read_part = read_part or read
        self._neighbours = neighbours
        self._max_bytes = max_bytes
        self._stored_bytes = stored_bytes or (lambda _: 1)
        self._recent: OrderedDict[int, Block] = OrderedDict()
        self._recent_bytes = 0
        self._held: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self._pending: dict[int, _Wanted] = {}
        self._asked: deque[_Wanted] = deque()
        self._later: list[tuple[float, int, _Wanted]] = []  # a heap; equally due ones in the order they were asked for
        self._order = count()
        self._ahead: dict[int, int] = {}  # block -> bytes, from the start of its read until it is asked for
        self._tickets: weakref.WeakValueDictionary[int, Future[Block]] = weakref.WeakValueDictionary()  # of `_ahead`
        self._waiting = 0
        self._in_flight = 0
        self._decoded, self._stored = USUAL_EXPANSION * 2**20, float(2**20)
        self._limit = ReadLimit(most=readers)
        self.needed_bytes = 0
        """Stored bytes of the rows that were asked for."""
        self._gathering = False
        self._closed = False
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="block-reader")

    def prefetch(
        self, blocks: Sequence[int], parts: Collection[int] = (), due: Sequence[float] | None = None
    ) -> list[Future[Block]]:
        """Blocks that will be wanted soon, read as far as there is room; `parts`: those of which only a part is; `due`
        [blocks]: when they will be wanted, in epochs of their stream. Who holds the answer holds the blocks."""
        times = [0.0] * len(blocks) if due is None else due
        with self._lock:
            futures = [
                self._want(block, ahead=True, part=block in parts, due=time)
                for block, time in zip(blocks, times, strict=True)
            ]
            self._start_reads()
        return futures

    @contextmanager
    def all_at_once(self) -> Iterator[None]:
        """While this holds, reads wait for no others: a run that goes on wants many blocks, all for its first step.
        None is read before somebody waits for one, so that by then it is known which of them lie beside each other."""
        self._gathering = True
        try:
            with self._limit.lifted():
                yield
        finally:
            with self._lock:
                self._gathering = False
                self._start_reads()

    def get_all(self, blocks: Iterable[int], parts: Collection[int] = (), needed_bytes: int = 0) -> list[Block]:
        """The decoded blocks, once all are there; of `parts` only a part will be served, `needed_bytes` (stored) in
        all. Raises what reading one raises."""
        with self._lock:
            self.needed_bytes += needed_bytes
            futures = [self._want(block, ahead=False, part=block in parts) for block in blocks]
            self._gathering = False
            self._start_reads()
            self._waiting += 1
        try:
            return [future.result() for future in futures]
        finally:
            with self._lock:
                self._waiting -= 1

    def get(self, block: int) -> Block:
        """The decoded block, of which some rows are wanted. Raises what reading it raises."""
        return self.get_all([block], [block])[0]

    def close(self) -> None:
        """Stop reading."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _want(self, block: int, *, ahead: bool, part: bool, due: float = 0.0) -> Future[Block]:
        if not ahead:
            self._ahead.pop(block, None)
        known = self._held.get(block)
        if known is not None:
            self._keep(block, known)
            done: Future[Block] = Future()
            done.set_result(known)
            return done
        wanted = self._pending.get(block)
        if wanted is None:
            guess = int(self._stored_bytes(block) * self._decoded / self._stored)
            wanted = self._pending[block] = _Wanted(block, ahead, part, guess, due)
            self._line_up(wanted)
        elif wanted.ahead and not wanted.started and (not ahead or due < wanted.due):
            wanted.ahead, wanted.due = ahead, due
            self._line_up(wanted)  # it stands in `_later` already, where it will be passed over
        elif not ahead:
            wanted.ahead = False
        return wanted.future

    def _line_up(self, wanted: _Wanted) -> None:
        if wanted.ahead:
            heapq.heappush(self._later, (wanted.due, next(self._order), wanted))
        else:
            self._asked.append(wanted)

    def _start_reads(self) -> None:
        while not self._closed and not self._gathering and self._in_flight < self._limit.value:
            wanted = self._next()
            if wanted is None:
                return
            run = self._begin(wanted)
            self._in_flight += 1
            self._pool.submit(self._load, run)

    def _next(self) -> _Wanted | None:
        """What is read next: what was asked for, else what there is room for."""
        while self._asked:
            first = self._asked.popleft()
            if not first.started:
                return first
        while self._later:
            first = self._later[0][-1]
            passed_over = first.started or not first.ahead or first.nbytes > self._max_bytes
            if not passed_over and not self._has_room(first):
                return None
            heapq.heappop(self._later)
            if not passed_over:
                return first
        return None

    def _begin(self, wanted: _Wanted) -> list[_Wanted]:
        """What one read brings: a block, and neighbours that are wanted too; in their order."""
        self._mark_started(wanted)
        run = [wanted]
        nbytes = self._stored_bytes(wanted.block)
        while (more := self._neighbour(run[-1].block, 1, nbytes)) is not None:
            run.append(more)
            nbytes += self._stored_bytes(more.block)
        while (more := self._neighbour(run[0].block, -1, nbytes)) is not None:
            run.insert(0, more)
            nbytes += self._stored_bytes(more.block)
        return run

    def _neighbour(self, block: int, step: int, nbytes: int) -> _Wanted | None:
        """The block beside one, now begun, if a read of `nbytes` may bring it too."""
        beside = self._pending.get(block + step)
        if self._neighbours is None or beside is None or beside.started:
            return None
        joins = self._neighbours.joins(min(block, beside.block))
        if not joins or nbytes + self._stored_bytes(beside.block) > JOINED_BYTES:
            return None
        if beside.ahead and not self._has_room(beside):
            return None
        self._mark_started(beside)
        return beside

    def _mark_started(self, wanted: _Wanted) -> None:
        wanted.started = True
        if wanted.ahead:
            self._ahead[wanted.block] = wanted.nbytes
            self._tickets[wanted.block] = wanted.future

    def _has_room(self, wanted: _Wanted) -> bool:
        if sum(self._ahead.values()) + wanted.nbytes <= self._max_bytes:
            return True
        # Somebody may have let go of blocks without having asked for them.
        self._ahead = {block: nbytes for block, nbytes in self._ahead.items() if block in self._tickets}
        return sum(self._ahead.values()) + wanted.nbytes <= self._max_bytes

    def _load(self, run: Sequence[_Wanted]) -> None:
        outcomes = self._outcomes(run)
        with self._lock:
            for wanted, outcome in zip(run, outcomes, strict=True):
                self._finish(wanted, outcome)
            self._in_flight -= 1
            self._limit.done(
                sum(self._stored_bytes(wanted.block) for wanted in run), time.perf_counter(), waiting=self._waiting > 0
            )
            self._start_reads()
        for wanted, outcome in zip(run, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                wanted.future.set_exception(outcome)
            else:
                wanted.future.set_result(outcome)

    def _outcomes(self, run: Sequence[_Wanted]) -> Sequence[Block | BaseException]:
        """The blocks of a read, or what is raised where one is asked for."""
        try:
            if len(run) > 1 and self._neighbours is not None:
                return self._neighbours.read_run([wanted.block for wanted in run])
            (wanted,) = run
            return [(self._read_part if wanted.part else self._read)(wanted.block)]
        except BaseException as error:
            if len(run) == 1:
                return [error]
        return [self._outcomes([wanted])[0] for wanted in run]  # which of them is broken

    def _finish(self, wanted: _Wanted, outcome: Block | BaseException) -> None:
        del self._pending[wanted.block]
        if isinstance(outcome, BaseException):
            self._ahead.pop(wanted.block, None)
            return
        if not wanted.part:  # those may be mapped from disk
            self._decoded += outcome.memory_bytes
            self._stored += self._stored_bytes(wanted.block)
        if wanted.block in self._ahead:
            self._ahead[wanted.block] = outcome.memory_bytes
        self._held[wanted.block] = outcome
        self._keep(wanted.block, outcome)

    def _keep(self, block: int, loaded: Block) -> None:
        """Make a block the most recent one and let the oldest go."""
        if block in self._recent:
            self._recent.move_to_end(block)
            return
        self._recent[block] = loaded
        self._recent_bytes += loaded.memory_bytes
        while self._recent_bytes > self._max_bytes and len(self._recent) > 1:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= oldest.memory_bytes
