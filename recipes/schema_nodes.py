"""What every `cluster` section has: how failures are met, and how many nodes a run may have."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .section import NonNegativeInt, PositiveInt, Section

PositiveSeconds = Annotated[float, Field(gt=0.0)]


class NodeRange(Section):
    """As many nodes as there are, within bounds: a run goes on with fewer when some are lost, and with more when they
    are back."""

    min: PositiveInt
    """With fewer nodes it waits."""
    max: PositiveInt
    """Nodes to use at most. What a step trains on is the same whatever their number."""
    grow_after_s: PositiveSeconds = 30.0
    """Seconds for which more nodes must have been there before ranks save and start again on all of them: for a node
    that comes and goes they would start over and over."""


def most_nodes(nodes: int | NodeRange) -> int:
    """Nodes that a run uses where all are there."""
    return nodes.max if isinstance(nodes, NodeRange) else nodes


def least_nodes(nodes: int | NodeRange) -> int:
    """Nodes without which it waits."""
    return nodes.min if isinstance(nodes, NodeRange) else nodes


class Cluster(Section):
    """What all kinds of clusters have: how failures are met."""

    max_restarts: NonNegativeInt = 3
    """Times a run is started again by itself after failures of machines without getting to a newer checkpoint between
    them; a run that gets further may fail as often as it likes. 0: the first failure ends it."""
    standby: bool = True
    """Keep a process in readiness on its node for every rank, with the slow imports done, so that ranks that are
    started again begin some seconds earlier. Each takes about 0.4 GB of host memory; where less than 2 GB for each
    would be left, none is kept."""
    hang_timeout_s: PositiveSeconds = 60.0
    """Seconds without an answer from a rank, or without a step (and five times the slowest step so far), after which
    ranks are looked at: a rank that is stuck is named, all stacks are written down, and the ranks are started again."""
