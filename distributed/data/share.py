"""Which bins of a step a rank serves: a pure function of ranks, streams and batch sizes.

Bins of a step are numbered g = 0 .. B-1; bin g is the (g // S)-th of this step from logical stream g % S. With
R <= S ranks, each serves consecutive streams; with more, the ranks r with r % S == s share stream s: each reads it and
keeps every so-many-th bin.

Micro-batches are cut from a rank's bins in the order of its streams, and streams are dealt to ranks in units that give
whole micro-batches where there are enough of them. So the same bins share a micro-batch, and with it dropout's seed, at
every world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...recipes.errors import UserError


@dataclass(frozen=True)
class Share:
    """What a rank serves. `sharers` > 1: it keeps bins j of its stream with j % sharers == place."""

    streams: tuple[int, ...]
    num_streams: int
    """Streams of the whole run."""
    sharers: int
    place: int
    bins_per_stream: int
    """Bins of a stream in every step."""
    micro_batches: int
    """Micro-batches in every step, the same on every rank."""

    @property
    def counts(self) -> bool:
        """True on the one of the sharers that reports progress and counters."""
        return self.place == 0


def share_of(rank: int, world_size: int, streams: int, global_batch_size: int, micro_batch_size: int) -> Share:
    """Which bins of every step a rank serves; every rank has the same number of micro-batches.

    Raises UserError when `streams` does not divide the global batch."""
    if global_batch_size % streams:
        raise UserError(f"data.streams {streams} must divide train.global_batch_size {global_batch_size}")
    bins_per_stream = global_batch_size // streams
    if world_size <= streams:
        unit = _streams_per_unit(streams, world_size, bins_per_stream, micro_batch_size)
        units = streams // unit
        mine = tuple(range(rank * units // world_size * unit, (rank + 1) * units // world_size * unit))
        most = -(-units // world_size) * unit * bins_per_stream
        return Share(mine, streams, 1, 0, bins_per_stream, -(-most // micro_batch_size))
    stream = rank % streams
    sharers = -(-(world_size - stream) // streams)
    most = -(-bins_per_stream // (world_size // streams))
    return Share((stream,), streams, sharers, rank // streams, bins_per_stream, -(-most // micro_batch_size))


def _streams_per_unit(streams: int, world_size: int, bins_per_stream: int, micro_batch_size: int) -> int:
    """Streams whose bins of a step are whole micro-batches; 1 where that leaves ranks without any."""
    unit = math.lcm(bins_per_stream, micro_batch_size) // bins_per_stream
    return unit if streams % unit == 0 and streams // unit >= world_size else 1
