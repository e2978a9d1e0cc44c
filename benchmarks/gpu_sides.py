"""One side of `gpu_runs`: a process that trains on one GPU for ever, and measures a turn of steps when it is told to.

    python gpu_sides.py "fsdp by hand"|"fsdp ftlaunch"|… FOLDER cuda BATCH SEQUENCE DROPPED MEASURED

See `step_sides.py` for what a turn is. All compute in bfloat16. By hand: what the library's own tutorial does, with the
tokens ready. Ours: the whole rank's program, which reads and tokenises text, as `model.dtype: bfloat16` has it.

Shapes: B sequences of a batch, S tokens in a sequence.
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
from step_sides import FOR_EVER, Turns, Work, ftlaunch, load_model, read_batches

OURS: dict[str, dict[str, Any]] = {
    "fsdp": {"strategy": {"type": "fsdp"}},
    "zero3": {"strategy": {"type": "deepspeed", "stage": 3}},
    "lora": {"strategy": {"type": "fsdp"}, "adapter": LORA},
    "qlora": {"strategy": {"type": "ddp"}, "adapter": {**LORA, "type": "qlora"}},
}


def fsdp(work: Work) -> Step:
    """torch's `fully_shard`, with weights in fp32 that compute in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = load_model(work).to(work.device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return torch_step(sharded(model, model.model.layers, mp_policy=policy))


def zero3(work: Work) -> Step:
    """`deepspeed.initialize`."""
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    return deepspeed_step(load_model(work).to(torch.bfloat16), work.batch, **config)


def lora(work: Work, quantized: bool = False) -> Step:
    """peft on a base in bfloat16, or in transformers' 4 bits; the adapter is in fp32, as peft makes it."""
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
    return torch_step(with_lora(base), autocast=True)


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
