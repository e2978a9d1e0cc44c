"""One side of `step_overhead`: trains for ever, and measures a turn of steps whenever it is told to.

    python step_sides.py SIDE FOLDER DEVICE BATCH SEQUENCE DROPPED MEASURED

On a CPU all compute in float32; on CUDA all in bfloat16 with float32 master weights: the bare loop and the Trainer by
autocast, ours as `model.dtype: bfloat16` does it.

Reads a line from standard input for every turn, and answers with a line "turn {seconds: […], cpu_s: …, …}": the time
between the ends of neighbouring steps, so everything that a loop does around a step counts, the processor time of all
threads and readers over those steps, and the peak of what CUDA's allocator has handed out. The first steps of a turn
are dropped: a background reader has made those while the other sides had their turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

LEARNING_RATE = 1e-4
FOR_EVER = 10_000_000


class Turns:
    """Counts steps, answers, and waits for the next turn."""

    def __init__(self, dropped: int, measured: int) -> None:
        self._dropped, self._measured = dropped, measured
        self._ends: list[float] = []
        self._tokens: list[int] = []
        self._cpu_s = 0.0
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        # Whatever libraries print belongs to people.
        os.dup2(2, 1)

    def step_done(self, tokens: int = 0) -> None:
        """A step has ended, with `tokens` seen so far (0: nobody counts); returns when the next one shall begin."""
        self._ends.append(time.perf_counter())
        self._tokens.append(tokens)
        if len(self._ends) == self._dropped:
            self._cpu_s = cpu_s()
        if len(self._ends) < self._dropped + self._measured:
            return
        ends = self._ends[self._dropped - 1 :]
        turn = {
            "seconds": [later - sooner for sooner, later in pairwise(ends)],
            "tokens": [later - sooner for sooner, later in pairwise(self._tokens[self._dropped - 1 :])],
            "cpu_s": cpu_s() - self._cpu_s,
            "peak_bytes": peak_bytes(),
        }
        self._answers.write("turn " + json.dumps(turn) + "\n")
        if not sys.stdin.readline():
            os._exit(0)  # in the middle of somebody's loop: there is nothing to save
        self._ends, self._tokens = [], []


def cpu_s() -> float:
    """Processor time of this process and of those it has started [s]."""
    children = psutil.Process().children(recursive=True)
    # The system counts others in ticks, which a few short steps do not fill.
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


def peak_bytes() -> int:
    """Most that CUDA's allocator has handed out so far; 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def read_batches(folder: Path, batch: int) -> Any:
    """Tokenised beforehand: [N, B, S]."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    return torch.tensor(rows[: len(rows) // batch * batch]).view(-1, batch, len(rows[0]))


@dataclass(frozen=True)
class Work:
    """What a side trains on: `batch` sequences of `sequence` tokens of the text in `folder`, on `device`."""

    folder: Path
    device: str
    batch: int
    sequence: int

    @property
    def on_gpu(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.device != "cpu"


def load_model(work: Work) -> Any:
    """As transformers loads it, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def bare(work: Work, turns: Turns) -> None:
    """The loop that one would write by hand."""
    import torch

    model, batches = load_model(work).to(work.device), read_batches(work.folder, work.batch)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, weight_decay=0.0)
    for step in range(FOR_EVER):
        input_ids = batches[step % len(batches)].to(work.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=work.on_gpu):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        turns.step_done()


def hf_trainer(work: Work, turns: Turns) -> None:
    """transformers' Trainer, with its defaults where they do not change what is computed."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step_done()

    rows = read_batches(work.folder, work.batch).flatten(0, 1)
    arguments = TrainingArguments(
        output_dir=str(work.folder / "hf"),
        max_steps=FOR_EVER,
        per_device_train_batch_size=work.batch,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        use_cpu=not work.on_gpu,
        bf16=work.on_gpu,
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=load_model(work), args=arguments, train_dataset=dataset, callbacks=[EndOfStep()]).train()


class StepMonitor:
    """A run's monitor: hears of a step when it is recorded, the last thing that the loop does for it."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def emit(self, event: Any) -> None:
        if event["kind"] == "step":
            self._turns.step_done(event["tokens"])

    def stop_requested(self) -> bool:
        return False


def ftlaunch(name: str, **changes: Any) -> Callable[[Work, Turns], None]:
    """One rank's program, whole: text is read and tokenised in the background, metrics are recorded. `changes`: of the
    recipe's sections."""

    def side(work: Work, turns: Turns) -> None:
        from workload import Size, recipe, write_recipe

        from ftlaunch.distributed.entry import Job, run_rank
        from ftlaunch.distributed.world import World
        from ftlaunch.recipes.load import load_recipe

        size, folder = Size(hidden=0, layers=0, vocab=0, sequence=work.sequence, batch=work.batch), work.folder
        sections = recipe(folder / name, folder / "model", folder / "text.jsonl", size)
        sections["train"] |= {"max_steps": FOR_EVER, "learning_rate": LEARNING_RATE}
        sections["model"]["dtype"] = "bfloat16" if work.on_gpu else "float32"
        for section, values in changes.items():
            sections[section] = {**sections.get(section, {}), **values}
        path = write_recipe(folder / f"{name}.yaml", sections)
        world = World(device=f"{work.device}:0" if work.on_gpu else "cpu")
        run_rank(Job(load_recipe(str(path), (), environ={}), world, "env://", StepMonitor(turns)))

    return side


SIDES = {
    "bare": bare,
    "hf_trainer": hf_trainer,
    "ddp": ftlaunch("ddp", strategy={"type": "ddp"}),
    "fsdp": ftlaunch("fsdp", strategy={"type": "fsdp"}),
    "packed_auto": ftlaunch("packed_auto", data={"packing": True}),
    "packed_sdpa": ftlaunch("packed_sdpa", data={"packing": True}, model={"attention": "sdpa"}),
    "padded": ftlaunch("padded"),
}


def main() -> None:
    side, folder, device, *numbers = sys.argv[1:]
    batch, sequence, dropped, measured = map(int, numbers)
    SIDES[side](Work(Path(folder), device, batch, sequence), Turns(dropped, measured))


if __name__ == "__main__":
    main()
