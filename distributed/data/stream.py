"""The data stream of one rank: global batches that do not depend on who reads them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...recipes.methods.base import Rejected, RowId
from ...recipes.schema import Data, Recipe
from ..node_folder import NodeFolder
from . import counters
from .feed import AHEAD_BYTES, Feed, ThreadFeed
from .index import Index
from .intake import Encode
from .lane_plan import plan_lanes, total_bytes
from .node_cache import LARGE_BYTES, NodePlace
from .parts import Collate, MicroBatch, PartSpec, States, split_share
from .process_feed import ProcessFeed
from .share import Share, share_of

CACHE_BYTES = 256 * 2**20
"""Decoded blocks that one rank keeps for a while beyond those its streams hold, and again as much read ahead."""

CORES_PER_READER = 4
USUAL_READERS = 2
"""At most, unless the recipe asks for more: two tokenise faster than most models learn, and each holds a tokenizer."""


class StepBatches(NamedTuple):
    """One rank's part of one optimizer step.

    `served_bytes`: progress of the streams that this rank counts; over all ranks and steps it adds up to
    `total_bytes`. `counters`: running totals of the same streams. `num_bins` and `num_tokens`: real ones in this
    rank's micro-batches; a step with no bins on any rank is the end. `rejections`: some of the rows that were refused.
    `read_bytes`: stored bytes of the blocks that were read since the last step, ahead of the loop, `needed_bytes` of
    the rows in them that are served: blocks that several streams or ranks share are read by each. `data_wait_s`: how
    long the loop waited for this step; `reader_idle_s`: how long readers stood still with it, on average of them.
    """

    micro_batches: tuple[MicroBatch, ...]
    served_bytes: int
    counters: counters.Counts
    num_bins: int
    num_tokens: int
    rejections: tuple[tuple[RowId, Rejected], ...]
    read_bytes: int
    needed_bytes: int
    data_wait_s: float
    reader_idle_s: float


class Stream:
    """The batches of one rank, read ahead in the background. The state is that of the last step handed out."""

    def __init__(self, feeds: Sequence[Feed], share: Share, total_bytes: int, node: NodeFolder | None) -> None:
        self.total_bytes = total_bytes
        """Bytes that all streams serve in the whole run, for progress; 0 when the run is not counted in epochs."""
        self.data_wait_s = 0.0
        """Time the loop has waited for data."""
        self._feeds = feeds
        self._share = share
        self._node = node
        self._states: list[States | bytes] | None = None
        self._begun = False

    def next_step(self) -> StepBatches:
        """This rank's micro-batches of the next step. Raises what reading or encoding raised."""
        self.begin()
        start = time.perf_counter()
        parts = [feed.next_part() for feed in self._feeds]
        waited = time.perf_counter() - start
        self.data_wait_s += waited
        self._states = [part.states for part in parts]
        return StepBatches(
            tuple(micro for part in parts for micro in part.micro_batches),
            sum(part.served_bytes for part in parts),
            counters.total(part.counters for part in parts),
            sum(part.num_bins for part in parts),
            sum(part.num_tokens for part in parts),
            tuple(one for part in parts for one in part.rejections),
            sum(part.read_bytes for part in parts),
            sum(part.needed_bytes for part in parts),
            waited,
            sum(part.reader_idle_s for part in parts) / len(parts),
        )

    def state(self) -> dict[str, dict[str, Any]]:
        """The streams this rank serves, by number, after the last step handed out. JSON, about 1 KB each."""
        self.begin()
        if self._states is None:
            self._states = [feed.initial_states() for feed in self._feeds]
        parts = [json.loads(part) if isinstance(part, bytes) else part for part in self._states]
        return {number: dict(state) for part in parts for number, state in part.items()}

    def restore(self, states: States) -> None:
        """Go on from the states of all ranks of a run at any world size; before anything else. Raises UserError."""
        assert not self._begun, "restore before the first step"
        self._begin(states)

    def begin(self) -> None:
        """Start reading ahead, unless it has started."""
        if not self._begun:
            self._begin(None)

    def close(self) -> None:
        """Stop reading ahead."""
        for feed in self._feeds:
            feed.close()
        if self._node is not None:
            self._node.close()
            self._node = None

    def _begin(self, states: States | None) -> None:
        self._begun = True
        for feed in self._feeds:
            feed.begin(states)


def open_stream(
    *,
    index: Index,
    recipe: Recipe,
    world_rank: int,
    world_size: int,
    streams: int,
    encode: Encode,
    collate: Collate,
    pad_to_full: bool = False,
    reader_processes: int = 0,
    node_key: str | None = None,
) -> Stream:
    """The training stream of one rank. `index`: of `recipe.data.train`, in its order; `streams`: logical streams, as
    recorded with the run. `reader_processes` 0: a thread of this process reads; else `encode` and `collate` are
    pickled. `node_key`: the same for all ranks of an attempt; blocks that a node's ranks share on disk lie under it.
    Raises UserError when the streams do not divide the global batch."""
    data, train = recipe.data, recipe.train
    share = share_of(world_rank, world_size, streams, train.global_batch_size, train.micro_batch_size)
    shares = split_share(share, train.micro_batch_size, max(1, reader_processes))
    open_feed = ProcessFeed if reader_processes else ThreadFeed
    node = _node_folder(index, data, node_key)
    place = NodePlace(node.path, node.max_bytes, data.disk_cache_gb is not None) if node else None
    cache_bytes = CACHE_BYTES // len(shares)
    feeds: list[Feed] = []
    for part in shares:
        spec = PartSpec(index, data, train, part, encode, collate, pad_to_full, cache_bytes, place)
        feeds.append(open_feed(spec, ahead_bytes=AHEAD_BYTES // len(shares)))
    return Stream(feeds, share, total_bytes(plan_lanes(index, data, train, streams)), node)


def _node_folder(index: Index, data: Data, key: str | None) -> NodeFolder | None:
    if key and data.disk_cache_gb is not None:
        return NodeFolder(key, max_bytes=int(data.disk_cache_gb * 1e9))
    return NodeFolder(key) if key and (index.block_bytes >= LARGE_BYTES).any() else None


def usual_readers(cores_per_rank: int, *, on_gpu: bool) -> int:
    """Reader processes of a rank that are used unless the recipe says how many; 0: a thread.

    A rank on a CPU computes on all its cores, and a process would only take one from it (measured: as fast as a thread
    within the noise). A rank on a GPU hands kernels out from one core, and has others to spare."""
    return min(USUAL_READERS, cores_per_rank // CORES_PER_READER) if on_gpu else 0
