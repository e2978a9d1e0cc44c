"""One side of `step_overhead`: trains for ever, and measures a turn of steps whenever it is told to.

    python step_sides.py SIDE FOLDER BATCH SEQUENCE DROPPED MEASURED

Reads a line from standard input for every turn, and answers with a line "turn {seconds: […], cpu_s: …}": the time
between the ends of neighbouring steps, so everything that a loop does around a step counts, and the processor time of
all threads and readers over those steps. The first steps of a turn are dropped: a background reader has made those
while the other sides had their turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
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
        self._cpu_s = 0.0
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        # Whatever libraries print belongs to people.
        os.dup2(2, 1)

    def step_done(self) -> None:
        """A step has ended; returns when the next one shall begin."""
        self._ends.append(time.perf_counter())
        if len(self._ends) == self._dropped:
            self._cpu_s = cpu_s()
        if len(self._ends) < self._dropped + self._measured:
            return
        ends = self._ends[self._dropped - 1 :]
        seconds = [later - sooner for sooner, later in pairwise(ends)]
        self._answers.write("turn " + json.dumps({"seconds": seconds, "cpu_s": cpu_s() - self._cpu_s}) + "\n")
        if not sys.stdin.readline():
            os._exit(0)  # in the middle of somebody's loop: there is nothing to save
        self._ends = []


def cpu_s() -> float:
    """Processor time of this process and of those it has started [s]."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def read_batches(folder: Path, batch: int) -> Any:
    """Tokenised beforehand: [N, B, S]."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    return torch.tensor(rows[: len(rows) // batch * batch]).view(-1, batch, len(rows[0]))


def load_model(folder: Path) -> Any:
    """As transformers loads it, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def bare(folder: Path, batch: int, _sequence: int, turns: Turns) -> None:
    """The loop that one would write by hand."""
    import torch

    model, batches = load_model(folder), read_batches(folder, batch)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, weight_decay=0.0)
    for step in range(FOR_EVER):
        input_ids = batches[step % len(batches)]
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        turns.step_done()


def hf_trainer(folder: Path, batch: int, _sequence: int, turns: Turns) -> None:
    """transformers' Trainer, with its defaults where they do not change what is computed."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step_done()

    rows = read_batches(folder, batch).flatten(0, 1)
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        max_steps=FOR_EVER,
        per_device_train_batch_size=batch,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=load_model(folder), args=arguments, train_dataset=dataset, callbacks=[EndOfStep()]).train()


class StepMonitor:
    """A run's monitor: hears of a step when it is recorded, the last thing that the loop does for it."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def emit(self, event: Any) -> None:
        if event["kind"] == "step":
            self._turns.step_done()

    def stop_requested(self) -> bool:
        return False


def ftlaunch(strategy: str) -> Callable[[Path, int, int, Turns], None]:
    """One rank's program, whole: text is read and tokenised in the background, metrics are recorded."""

    def side(folder: Path, batch: int, sequence: int, turns: Turns) -> None:
        from workload import Size, recipe, write_recipe

        from ftlaunch.distributed.entry import Job, run_rank
        from ftlaunch.distributed.world import World
        from ftlaunch.recipes.load import load_recipe

        size = Size(hidden=0, layers=0, vocab=0, sequence=sequence, batch=batch)
        sections = recipe(folder / strategy, folder / "model", folder / "text.jsonl", size, strategy={"type": strategy})
        sections["train"] |= {"max_steps": FOR_EVER, "learning_rate": LEARNING_RATE}
        path = write_recipe(folder / f"{strategy}.yaml", sections)
        run_rank(Job(load_recipe(str(path), (), environ={}), World(), "env://", StepMonitor(turns)))

    return side


SIDES = {"bare": bare, "hf_trainer": hf_trainer, "ddp": ftlaunch("ddp"), "fsdp": ftlaunch("fsdp")}


def main() -> None:
    side, folder, *numbers = sys.argv[1:]
    batch, sequence, dropped, measured = map(int, numbers)
    SIDES[side](Path(folder), batch, sequence, Turns(dropped, measured))


if __name__ == "__main__":
    main()
