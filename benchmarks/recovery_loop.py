"""The peers of `recovery`: a loop as one would write it, with a checkpoint every few steps, by torchrun or Ray Train.

torchrun --nproc-per-node 2 --max-restarts 3 recovery_loop.py FOLDER
python recovery_loop.py FOLDER ADDRESS NODES [FAILURES]     under Ray Train, on a cluster that is there

FOLDER has model/ and text.jsonl; steps.jsonl tells of steps, checkpoint.pt is the newest checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

BATCH = 4
SAVE_EVERY = 10
STEPS = 100_000


def train(folder: Path) -> None:
    """Train from the newest checkpoint on; ranks have formed a process group."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rank, size = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    module = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    step, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    model = DistributedDataParallel(module)
    rows = [json.loads(line)["text"] + tokenizer.eos_token for line in (folder / "text.jsonl").read_text().splitlines()]
    while step < STEPS:
        for row in range(rank, BATCH, size):
            input_ids = torch.tensor([tokenizer(rows[(step * BATCH + row) % len(rows)])["input_ids"]])
            (model(input_ids=input_ids, labels=input_ids).loss * size / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if rank == 0:
            with (folder / "steps.jsonl").open("a") as log:
                log.write(json.dumps({"step": step}) + "\n")
            if step % SAVE_EVERY == 0:
                state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, folder / "checkpoint.new")
                (folder / "checkpoint.new").replace(checkpoint)


def under_torchrun(folder: Path) -> None:
    """One rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    train(folder)


def as_worker(config: dict[str, Any]) -> None:
    """One rank of Ray Train's, which has formed the group."""
    train(Path(config["folder"]))


def under_ray(folder: Path, address: str, nodes: str, failures: str = "3") -> None:
    """The driver. With two numbers (1-2) the number of ranks is elastic; everything else is Ray Train's default."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}})
    least, _, most = nodes.partition("-")
    workers = (int(least), int(most)) if most else int(least)
    TorchTrainer(
        as_worker,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="recovery", storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=int(failures))
        ),
    ).fit()


if __name__ == "__main__":
    if "RANK" in os.environ:
        under_torchrun(Path(sys.argv[1]))
    else:
        under_ray(Path(sys.argv[1]).resolve(), *sys.argv[2:])
