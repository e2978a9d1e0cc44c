"""What do runs on a GPU reach? Tokens/s, peak memory and the stall of a save, in bfloat16, at real widths.

The widths and the vocabulary of Llama 3.2 3B, few of its layers, random weights. FSDP, ZeRO-3, LoRA and QLoRA, each
against the same library driven by hand; both sides of a pair hold the GPU's memory for its whole part of the benchmark,
frozen (SIGSTOP) while the other has its turn. Then whole runs under torchrun save in the background; the limit is a
copy of as many bytes to page-locked memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_sides import BY_HAND, OURS
from harness import Rounds, Table, arguments, interleave, parse, run_checked, write_results
from step_overhead import Side
from step_sides import LEARNING_RATE
from workload import Size, recipe, write_model, write_recipe, write_text

CLAIM = (
    "On one GPU, at real widths: tokens/s and peak memory against the same library driven by hand (1 is alike), and "
    "how long a save in the background holds up training, against a copy of the same bytes to page-locked memory."
)
SIZE = Size(hidden=3072, layers=8, vocab=128_256, sequence=2048, batch=2)
QUICK = Size(hidden=256, layers=2, vocab=512, sequence=64, batch=2)
HEAD = 128
SIDES = ("by hand", "ftlaunch")
ROWS = 256
DROPPED = 3
SAVES = 3
CHUNK = 64 * 2**20


def write_inputs(folder: Path, size: Size, seed: int) -> None:
    """A Llama of these widths with random weights in bfloat16, its words, and text of whole sequences."""
    widths = {
        "intermediate_size": size.hidden * 8 // 3,
        "num_attention_heads": size.hidden // HEAD,
        "num_key_value_heads": max(1, size.hidden // HEAD // 3),
        "tie_word_embeddings": True,
    }
    write_model(folder / "model", size, seed, "bfloat16", **widths)
    write_text(folder / "text.jsonl", size, ROWS, seed)


def rates(name: str, folder: Path, size: Size, options: argparse.Namespace) -> list[Table]:
    """Tokens/s of both sides by the median step of a turn, and the most memory that they have taken."""
    peaks: Rounds = {}

    def turn(who: str, side: Side) -> float:
        taken = side.turn()
        peaks.setdefault(who, []).append(taken.peak_bytes / 2**30)
        return size.batch * size.sequence / statistics.median(taken.seconds)

    with contextlib.ExitStack() as stack:
        turns = {}
        for who in SIDES:
            side = Side(f"{name} {who}", folder, "cuda", size, options.steps, dropped=DROPPED, script="gpu_sides.py")
            turns[who] = partial(turn, who, stack.enter_context(contextlib.closing(side)))
        measured = interleave(turns, options.rounds, name)
    return [Table(name, "tokens/s", "by hand", measured), Table(f"{name}: peak memory", "GiB", "by hand", peaks)]


def stalls(name: str, folder: Path, size: Size, options: argparse.Namespace) -> Table:
    """How long each save of a run in the background held up training, against a copy of the bytes that it wrote."""
    every = options.save_every
    sections = recipe(
        folder / name,
        folder / "model",
        folder / "text.jsonl",
        size,
        train={"max_steps": SAVES * every + 1, "learning_rate": LEARNING_RATE},
        checkpoint={"every_steps": every, "mode": "async", "keep_last": 1},
        evaluate={"at_start": False, "at_end": False},
        **OURS[name],
    )
    sections["model"]["dtype"] = "bfloat16"
    path = write_recipe(folder / f"{name}-saves.yaml", sections)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    run_checked([*torchrun, "-m", "ftlaunch.distributed.entry", str(path)], folder)
    run = Path(sections["checkpoint"]["path"]) / sections["name"]
    saves = [save for save in read(run / "metrics.jsonl") if save["kind"] == "checkpoint"][:SAVES]
    written = sum(file.stat().st_size for file in newest(run).rglob("*") if file.is_file())
    copies = [copy_seconds(written) for _ in saves]
    stalled = [save["save_stall_s"] for save in saves]
    whole = ", ".join(f"{save['seconds']:.1f}" for save in saves)
    note = f"{written / 2**30:.2f} GiB a save, committed {whole} s after it began; the first save locks its pages."
    title = f"{name}: training held up by saves 1 to {len(saves)}"
    return Table(title, "s", "copy", {"copy": copies, "stall": stalled}, note)


def newest(run: Path) -> Path:
    """The newest checkpoint's folder."""
    return max(run.glob("step-*.a*"))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def copy_seconds(size: int) -> float:
    """Of `size` bytes on the GPU, in pieces, to memory that is page-locked already."""
    device = torch.empty(CHUNK, dtype=torch.uint8, device="cuda")
    host = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
    host.copy_(device, non_blocking=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(max(1, size // CHUNK)):
        host.copy_(device, non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--runs", nargs="+", choices=BY_HAND, default=list(BY_HAND))
    parser.add_argument("--steps", type=int, default=10, help="measured steps in a turn")
    parser.add_argument("--save-every", type=int, default=150, help="steps between the saves of the second part")
    parser.add_argument("--place", help="where models and checkpoints lie meanwhile; some 60 GB are written")
    options = parse(parser)
    options.device = "cuda"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # frozen sides would outlive it
    size = QUICK if options.quick else SIZE
    tables: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="gpu-runs-", dir=options.place) as place:
        folder = Path(place)
        os.environ["TMPDIR"] = place
        write_inputs(folder, size, options.seed)
        for name in options.runs:
            tables += rates(name, folder, size, options)
            tables.append(stalls(name, folder, size, options))
            # Before the machine may be gone.
            settings = {**asdict(size), "steps_a_turn": options.steps, "dropped_steps_a_turn": DROPPED}
            write_results("gpu_runs", options, CLAIM, tables, settings)


if __name__ == "__main__":
    main()
