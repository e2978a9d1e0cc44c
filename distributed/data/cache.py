"""The decoded blocks that the streams of a rank share."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from .block import Block

CACHE_BYTES = 256 * 2**20
"""Decoded blocks that one rank keeps for a while beyond those its streams hold."""

READERS = 8
"""Block reads in flight per rank."""


class BlockCache:
    """Decoded blocks by id. A block that any stream still holds is never decoded again, and two streams that want
    the same one wait for one read."""

    def __init__(self, read: Callable[[int], Block], max_bytes: int = CACHE_BYTES, readers: int = READERS) -> None:
        self._read = read
        self._max_bytes = max_bytes
        self._recent: OrderedDict[int, Block] = OrderedDict()
        self._recent_bytes = 0
        self._held: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self._pending: dict[int, Future[Block]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="block-reader")

    def prefetch(self, blocks: Iterable[int]) -> list[Future[Block]]:
        """Start reading blocks that will be wanted soon. Who holds the answer holds the blocks."""
        return [self._request(block) for block in blocks]

    def get(self, block: int) -> Block:
        """The decoded block. Raises what reading it raises."""
        return self._request(block).result()

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _request(self, block: int) -> Future[Block]:
        with self._lock:
            if block in self._pending:
                return self._pending[block]
            known = self._held.get(block)
            if known is not None:
                self._keep(block, known)
                done: Future[Block] = Future()
                done.set_result(known)
                return done
            future = self._pool.submit(self._load, block)
            self._pending[block] = future
            return future

    def _load(self, block: int) -> Block:
        try:
            loaded = self._read(block)
        except BaseException:
            with self._lock:
                self._pending.pop(block, None)
            raise
        with self._lock:
            self._held[block] = loaded
            self._keep(block, loaded)
            self._pending.pop(block, None)
        return loaded

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
