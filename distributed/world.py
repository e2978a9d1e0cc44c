"""`World`: who this rank is among the others. The only topology object; it is passed in, never looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..recipes.errors import UserError


@dataclass(frozen=True)
class World:
    """One rank's place.

    `device` is "cpu" or "cuda:K". `rank` counts over the whole run, `local_rank` within the
    node, which runs `local_size` ranks.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs and commits."""
        return self.rank == 0

    @classmethod
    def from_torchrun(cls, environ: Mapping[str, str], *, num_gpus: int) -> World:
        """The world that torchrun describes in its variables; a plain `python -m` is a world of one. Raises UserError
        for more ranks on a node than it has GPUs: some would compute on a CPU, and all would wait for them."""
        local_rank = int(environ.get("LOCAL_RANK", 0))
        local_size = int(environ.get("LOCAL_WORLD_SIZE", 1))
        size = int(environ.get("WORLD_SIZE", 1))
        if 0 < num_gpus < local_size:
            raise UserError(
                f"torchrun --nproc-per-node {local_size}: this node shows {num_gpus} GPUs, and each rank takes one. "
                f"Start {num_gpus} ranks, or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU."
            )
        return cls(
            rank=int(environ.get("RANK", 0)),
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            node_rank=int(environ.get("GROUP_RANK", 0)),
            num_nodes=max(1, size // max(1, local_size)),
            device=f"cuda:{local_rank}" if num_gpus else "cpu",
        )
