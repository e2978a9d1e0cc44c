"""Where an estimate is made for, and what a device has to give."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"bfloat16": 2, "float32": 4}
"""`model.dtype` -> bytes of a value."""


@dataclass(frozen=True)
class Setting:
    """Ranks of the run, the nodes they are on, and where they compute: "cuda" or "cpu"."""

    ranks: int
    nodes: int = 1
    device: str = "cuda"

    @property
    def ranks_per_node(self) -> int:
        """On each node, where they are shared out evenly."""
        return max(1, self.ranks // self.nodes)


@dataclass(frozen=True)
class Room:
    """What a rank finds, the poorest of all: `device_bytes` on its device, `host_bytes` as its share of the host's
    memory; None: not known. `has_deepspeed`: whether it can be imported."""

    device_bytes: int | None
    host_bytes: int | None = None
    has_deepspeed: bool = True
