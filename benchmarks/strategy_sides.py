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
from step_sides import FOR_EVER, LEARNING_RATE, StepMonitor, Turns, Work, load_model, read_batches
from torch import Tensor
from workload import Size, recipe, write_recipe

RANKS = 2
MAX_NORM = 1.0

Step = Callable[[Tensor], Tensor]
"""One update on a rank's tokens [B, S]; its loss."""

LORA_RANK = 16

OURS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": {"type": "ddp"}},
    "fsdp": {"strategy": {"type": "fsdp"}},
    **{f"zero{stage}": {"strategy": {"type": "deepspeed", "stage": stage}} for stage in (1, 2, 3)},
    "lora": {
        "strategy": {"type": "fsdp"},
        "adapter": {"type": "lora", "rank": LORA_RANK, "alpha": 2 * LORA_RANK, "target_modules": "all-linear"},
    },
}
"""Name -> sections of the recipe."""


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """As everybody sets it up."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True, weight_decay=0.0)


def update(model: Any, optimizer: torch.optim.Optimizer, input_ids: Tensor) -> Tensor:
    """One step of a plain torch loop."""
    loss: Tensor = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def ddp(work: Work) -> Step:
    """torch's DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(load_model(work))
    return partial(update, model, adamw(model))


def fsdp(work: Work) -> Step:
    """torch's `fully_shard`, a layer at a time."""
    from torch.distributed.fsdp import fully_shard

    model = load_model(work)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return partial(update, model, adamw(model))


def lora(work: Work) -> Step:
    """peft's adapter of every linear layer but the head, within torch's `fully_shard`."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard

    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(work), config)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    return partial(update, model, adamw(model))


def zero(stage: int, work: Work) -> Step:
    """`deepspeed.initialize`, with torch's AdamW: DeepSpeed's own would have to be compiled."""
    import deepspeed

    model = load_model(work)
    config = {
        "train_micro_batch_size_per_gpu": work.batch,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
    }
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    engine = deepspeed.initialize(model=model, optimizer=adamw(model), config=config, dist_init_required=False)[0]

    def step(input_ids: Tensor) -> Tensor:
        loss: Tensor = engine(input_ids=input_ids, labels=input_ids).loss
        engine.backward(loss)
        engine.step()
        return loss

    return step


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
