"""How much memory does the loss take? Forward and backward of the loss alone, at a large vocabulary.

Each side has a fresh process. What is reported is its peak above a process that holds the same hidden states, head and
gradients and computes nothing: the limit. On the CPU that is the peak resident size, on CUDA the allocator's peak.
Shapes: N supervised positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness import Rounds, Table, arguments, interleave, parse, run_checked, versions, write_results

CLAIM = "Peak memory of forward and backward of the loss at a vocabulary of 128k, against logits that are all held."
SIDES = ("materialised", "ftlaunch")
NEWER_SIDES = ("torch linear_cross_entropy",)
"""Only in torch 2.13 and later."""

VOCABULARY = 131_072


def sides() -> tuple[str, ...]:
    """What the installed torch can do."""
    major, minor = versions()["torch"].split(".")[:2]
    return (*SIDES, *NEWER_SIDES) if (int(major), int(minor)) >= (2, 13) else SIDES


def measure(side: str, options: argparse.Namespace, supervised: float, seconds: Rounds) -> float:
    """MiB above the process that computes nothing; the time is noted."""
    idle = run_side("idle", options, supervised)
    found = run_side(side, options, supervised)
    seconds.setdefault(side, []).append(found["seconds"])
    return (found["peak_bytes"] - idle["peak_bytes"]) / 2**20


def run_side(side: str, options: argparse.Namespace, supervised: float) -> dict[str, float]:
    """One fresh process."""
    script = Path(__file__).resolve().parent / "loss_sides.py"
    numbers = [options.positions, options.hidden, options.vocabulary, supervised]
    with tempfile.TemporaryDirectory(prefix="loss-memory-") as folder:
        said = run_checked(
            [sys.executable, str(script), side, options.dtype, *map(str, numbers), str(options.seed)], Path(folder)
        )
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parse(parser)
    if options.quick:
        options.positions, options.hidden, options.vocabulary = 64, 32, 4096
    tables = []
    for supervised in (0.25,) if options.quick else (1.0, 0.25):
        title = f"{supervised:.0%} of {options.positions} positions supervised"
        seconds: Rounds = {}
        turns: dict[str, Callable[[], float]] = {
            side: partial(measure, side, options, supervised, seconds) for side in sides()
        }
        memory = interleave(turns, options.rounds, title)
        tables.append(Table(f"Peak memory, {title}", "MiB", "materialised", memory))
        tables.append(Table(f"Time, {title}", "s", "materialised", seconds))
    names = ("positions", "hidden", "vocabulary", "dtype")
    write_results("loss_memory", options, CLAIM, tables, {name: getattr(options, name) for name in names})


if __name__ == "__main__":
    main()
