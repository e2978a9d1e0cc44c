"""The peer of `launch`: what one would write for torchrun. Takes one optimizer step, and writes down when it ended.

torchrun --nproc-per-node N plain_launch.py MODEL TEXT [BATCH]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, text, *given = sys.argv[1:]
    batch = int(given[0]) if given else 4
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DistributedDataParallel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = [json.loads(line)["text"] + tokenizer.eos_token for line in Path(text).read_text().splitlines()]
    for row in rows[rank:batch:size]:
        input_ids = torch.tensor([tokenizer(row)["input_ids"]])
        (model(input_ids=input_ids, labels=input_ids).loss * size / batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if rank == 0:
        Path("first_step").write_text(repr(time.time()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
