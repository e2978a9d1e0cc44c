"""One side of `gpu_runs`: a process that trains on one GPU for ever, and measures a turn of steps when it is told to.

    python gpu_sides.py "fsdp by hand"|"fsdp ftlaunch"|… FOLDER cuda BATCH SEQUENCE DROPPED MEASURED

See `step_sides.py` for what a turn is. All compute in bfloat16. By hand: what the library's own tutorial does, with the
tokens ready. Ours: the whole rank's program, which reads and tokenises text, as `model.dtype: bfloat16` has it.

Shapes: B sequences of a batch, S tokens in a sequence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_sides import FOR_EVER, LEARNING_RATE, Turns, Work, ftlaunch, load_model, read_batches
from torch import Tensor, nn

MAX_NORM = 1.0
LORA_RANK = 16

Step = Callable[[Tensor], Tensor]
"""One update on tokens [B, S]; its loss."""

OURS: dict[str, dict[str, Any]] = {
    "fsdp": {"strategy": {"type": "fsdp"}},
    "zero3": {"strategy": {"type": "deepspeed", "stage": 3}},
    "lora": {"strategy": {"type": "fsdp"}, "adapter": {"type": "lora", "rank": LORA_RANK}},
    "qlora": {"strategy": {"type": "ddp"}, "adapter": {"type": "qlora", "rank": LORA_RANK}},
}


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """As everybody sets it up."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True, weight_decay=0.0)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, autocast: bool, input_ids: Tensor) -> Tensor:
    """One step of a plain torch loop."""
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss: Tensor = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def fsdp(work: Work) -> Step:
    """torch's `fully_shard`, a layer at a time, with weights in fp32 that compute in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = load_model(work).to(work.device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return partial(update, model, adamw(model.parameters()), False)


def zero3(work: Work) -> Step:
    """`deepspeed.initialize`, with torch's AdamW: DeepSpeed's own would have to be compiled."""
    import deepspeed

    model = load_model(work).to(torch.bfloat16)
    config = {
        "train_micro_batch_size_per_gpu": work.batch,
        "gradient_clipping": MAX_NORM,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    optimizer = adamw(model.parameters())
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]

    def step(input_ids: Tensor) -> Tensor:
        loss: Tensor = engine(input_ids=input_ids, labels=input_ids).loss
        engine.backward(loss)
        engine.step()
        return loss

    return step


def lora(work: Work, quantized: bool = False) -> Step:
    """peft on a base in bfloat16, or in transformers' 4 bits; the adapter is in fp32, as peft makes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        work.folder / "model",
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": work.device},
        quantization_config=bits if quantized else None,
    )
    base.config.use_cache = False
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    return partial(update, model, adamw(model.parameters()), True)


BY_HAND: dict[str, Callable[[Work], Step]] = {
    "fsdp": fsdp,
    "zero3": zero3,
    "lora": lora,
    "qlora": partial(lora, quantized=True),
}


def train_by_hand(name: str, work: Work, turns: Turns) -> None:
    """The library's loop."""
    os.environ |= {"LOCAL_RANK": "0"}  # DeepSpeed asks for it
    meeting = f"file://{work.folder}/{name}-meeting"
    dist.init_process_group("nccl", init_method=meeting, rank=0, world_size=1, device_id=torch.device(work.device))
    batches = read_batches(work.folder, work.batch)
    step = BY_HAND[name](work)
    for number in range(FOR_EVER):
        step(batches[number % len(batches)].to(work.device)).item()
        turns.step_done()


def main() -> None:
    side, folder, device, *numbers = sys.argv[1:]
    name, _, who = side.partition(" ")
    batch, sequence, dropped, measured = map(int, numbers)
    turns = Turns(dropped, measured)
    if who == "ftlaunch":
        ftlaunch(name, **OURS[name])(Work(Path(folder), device, batch, sequence), turns)
    else:
        train_by_hand(name, Work(Path(folder), f"{device}:0", batch, sequence), turns)


if __name__ == "__main__":
    main()
