"""One side of `step_strategies`: two gloo ranks that train for ever, and measure a turn of steps when they are told to.

    python strategy_sides.py "STRATEGY by hand"|"STRATEGY ftlaunch" FOLDER cpu BATCH SEQUENCE DROPPED MEASURED

See `step_sides.py` for what a turn is. All compute in float32. By hand: what the library's own tutorial does, with the
tokens ready, and no word between the ranks but the library's. Ours: the whole rank's program, which reads and tokenises
text and agrees on every step.

Shapes: B sequences of a rank's batch, S tokens in a sequence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from by_hand import LORA, Step, deepspeed_step, sharded, torch_step, with_lora
from step_sides import FOR_EVER, LEARNING_RATE, StepMonitor, Turns, Work, load_model, read_batches
from workload import Size, recipe, write_recipe

RANKS = 2

OURS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": {"type": "ddp"}},
    "fsdp": {"strategy": {"type": "fsdp"}},
    **{f"zero{stage}": {"strategy": {"type": "deepspeed", "stage": stage}} for stage in (1, 2, 3)},
    "lora": {"strategy": {"type": "fsdp"}, "adapter": LORA},
}
"""Name -> sections of the recipe."""


def ddp(work: Work) -> Step:
    """torch's DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    return torch_step(DistributedDataParallel(load_model(work)))


def fsdp(work: Work) -> Step:
    """torch's `fully_shard`."""
    model = load_model(work)
    return torch_step(sharded(model, model.model.layers))


def lora(work: Work) -> Step:
    """peft's adapter within torch's `fully_shard`."""
    model = with_lora(load_model(work))
    return torch_step(sharded(model, model.get_base_model().model.layers))


def zero(stage: int, work: Work) -> Step:
    """`deepspeed.initialize`."""
    config = {"zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False}
    return deepspeed_step(load_model(work), work.batch, **config)


BY_HAND: dict[str, Callable[[Work], Step]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "zero1": partial(zero, 1),
    "zero2": partial(zero, 2),
    "zero3": partial(zero, 3),
    "lora": lora,
}


def train_by_hand(strategy: str, work: Work, rank: int, rendezvous: str, step_done: Callable[[], None]) -> None:
    """The library's loop."""
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    step = BY_HAND[strategy](work)
    batches = read_batches(work.folder, work.batch)[rank::RANKS]
    for number in range(FOR_EVER):
        step(batches[number % len(batches)]).item()
        step_done()


class Silence:
    """The monitor of a rank that records nothing."""

    def emit(self, event: Any) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


def train_with_ftlaunch(strategy: str, work: Work, rank: int, rendezvous: str, monitor: Any) -> None:
    """The rank's program."""
    from ftlaunch.distributed.entry import Job, run_rank
    from ftlaunch.distributed.world import World
    from ftlaunch.recipes.load import load_recipe

    size = Size(hidden=0, layers=0, vocab=0, sequence=work.sequence, batch=work.batch)
    sections = recipe(work.folder / strategy, work.folder / "model", work.folder / "text.jsonl", size)
    sections["train"] |= {
        "max_steps": FOR_EVER,
        "learning_rate": LEARNING_RATE,
        "global_batch_size": RANKS * work.batch,
    }
    path = write_recipe(work.folder / f"{strategy}-{rank}.yaml", {**sections, **OURS[strategy]})
    world = World(rank=rank, size=RANKS, local_rank=rank, local_size=RANKS)
    run_rank(Job(load_recipe(str(path), (), environ={}), world, rendezvous, monitor))


def main() -> None:
    side, folder, device, *numbers = sys.argv[1:]
    strategy, _, who = side.partition(" ")
    batch, sequence, dropped, measured = map(int, numbers)
    work = Work(Path(folder), device, batch, sequence)
    rendezvous = f"file://{folder}/{side.replace(' ', '-')}"
    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama  # noqa: F401  once, for both ranks

    rank = 1 if os.fork() == 0 else 0
    if rank:
        os.dup2(2, 1)  # answers are of rank 0
    turns = Turns(dropped, measured) if rank == 0 else None
    if who == "ftlaunch":
        train_with_ftlaunch(strategy, work, rank, rendezvous, StepMonitor(turns) if turns else Silence())
    else:
        train_by_hand(strategy, work, rank, rendezvous, turns.step_done if turns else lambda: None)


if __name__ == "__main__":
    main()
