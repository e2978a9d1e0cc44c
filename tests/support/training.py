"""Train small recipes on forked ranks, and read back what the runs wrote down."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec.implementations.local  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from harness import run_distributed
from safetensors.torch import load_file
from torch import Tensor

# Imported before the fork, so that ranks do not each pay for it: what a run imports late is here too.
from ftlaunch.distributed import entry, varlen  # noqa: F401
from ftlaunch.distributed.optimizers import adamw  # noqa: F401
from ftlaunch.distributed.strategies import fsdp  # noqa: F401
from ftlaunch.distributed.world import World
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.methods import sft  # noqa: F401
from ftlaunch.recipes.schema import Recipe

# Small models fit below the size from which ZeRO-3 lets go of a gathered parameter at all.
_SHARDED = {"type": "deepspeed", "stage": 3, "deepspeed_config": {"zero_optimization": {
    "stage3_param_persistence_threshold": 0}}}  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"type": "ddp"},
    "fsdp": {"type": "fsdp"},
    "hybrid": {"type": "fsdp", "shard": "node"},
    "zero1": {"type": "deepspeed", "stage": 1},
    "zero2": {"type": "deepspeed", "stage": 2},
    "zero3": _SHARDED,
    "zero3-offload": {**_SHARDED, "offload_optimizer": "cpu", "offload_param": "cpu"},
    "zero2-offload": {"type": "deepspeed", "stage": 2, "offload_optimizer": "cpu"},
    "fsdp-offload": {"type": "fsdp", "offload": "cpu"},
}
"""Name in tests and tables -> `strategy` of the recipe."""

NODES = {1: (1,), 2: (1, 1), 3: (1, 1, 1), 4: (2, 2)}
"""World size -> ranks of each logical node where `hybrid` is to have something to repeat, and with 4 to shard too."""


@dataclass(frozen=True)
class Trained:
    """A run that has ended."""

    directory: Path
    lines: list[dict[str, Any]]
    """metrics.jsonl."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The optimizer steps, in order."""
        return [line for line in self.lines if line["kind"] == "step"]

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [step["loss"] for step in self.steps]

    @property
    def grad_norms(self) -> list[float]:
        """The gradient norm of every step, before clipping."""
        return [step["grad_norm"] for step in self.steps]

    @property
    def checkpoint(self) -> Path:
        """The newest committed checkpoint."""
        commit = max((self.directory / "commits").glob("*.json"))
        return self.directory / json.loads(commit.read_text())["directory"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that it stores, by part and name."""
        files = [*self.checkpoint.glob("*.safetensors"), *self.checkpoint.glob("training/*.safetensors")]
        return {f"{path.stem} {name}": value for path in files for name, value in load_file(path).items()}


class QuietMonitor:
    """Nobody watches, nobody interrupts."""

    def emit(self, event: Any) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


def train_all(
    recipes: Sequence[dict[str, Any]],
    world_size: int = 1,
    timeout_s: float = 600.0,
    ranks_per_node: Sequence[int] | None = None,
) -> list[Trained]:
    """Train recipes one after another on the same forked ranks. Each needs a `name` of its own. Logical nodes: how many
    ranks each has; None: one node for all."""
    nodes = tuple(ranks_per_node or (world_size,))
    loaded = [LoadedRecipe(Recipe.model_validate(recipe), "test.yaml", (), ()) for recipe in recipes]
    with tempfile.TemporaryDirectory(prefix="rendezvous-") as folder:
        run_distributed(_train_as_rank, world_size, loaded, folder, nodes, timeout_s=timeout_s, connect=False)
    return [read_run(Path(one.recipe.checkpoint.path) / one.recipe.name) for one in loaded]


def train(recipe: dict[str, Any], world_size: int = 1, ranks_per_node: Sequence[int] | None = None) -> Trained:
    """Train one recipe."""
    return train_all([recipe], world_size, ranks_per_node=ranks_per_node)[0]


def read_run(directory: Path) -> Trained:
    """What a run wrote down."""
    files = sorted(directory.glob("metrics*.jsonl"))
    return Trained(directory, [json.loads(line) for file in files for line in file.read_text().splitlines()])


def world_of(rank: int, ranks_per_node: Sequence[int]) -> World:
    """A rank's place where nodes run so many ranks each."""
    node = next(n for n in range(len(ranks_per_node)) if rank < sum(ranks_per_node[: n + 1]))
    return World(
        rank=rank,
        size=sum(ranks_per_node),
        local_rank=rank - sum(ranks_per_node[:node]),
        local_size=ranks_per_node[node],
        node_rank=node,
        num_nodes=len(ranks_per_node),
    )


def _train_as_rank(
    rank: int, size: int, recipes: Sequence[LoadedRecipe], folder: str, ranks_per_node: Sequence[int]
) -> None:
    assert size == sum(ranks_per_node)
    world = world_of(rank, ranks_per_node)
    for number, loaded in enumerate(recipes):
        entry.run_rank(entry.Job(loaded, world, f"file://{folder}/{number}", QuietMonitor(), ("test",)))
