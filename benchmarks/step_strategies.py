"""Does a strategy cost more than the library that does it, driven by hand? Steps of two gloo ranks on the CPU.

`ddp` against torch's DistributedDataParallel, `fsdp` against torch's `fully_shard`, ZeRO-1, 2 and 3 against
`deepspeed.initialize`, `lora` (an adapter under `fsdp`) against peft within `fully_shard`, each in the loop of its
tutorial: the same model, tokens per step, dtype, optimizer and number of threads. Both sides of a strategy live for its
whole part of the benchmark, frozen (SIGSTOP) while the other has its turn. The limit is the library.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

from harness import Rounds, Table, arguments, interleave, parse, write_results
from step_overhead import Side, write_inputs
from strategy_sides import BY_HAND, RANKS
from workload import Size

CLAIM = "Tokens/s of every strategy against the same library driven by hand (1 is as fast): at least 0.9."
SIZE = Size(hidden=512, layers=10, vocab=16_384, sequence=256, batch=2)
TINY = Size(hidden=64, layers=1, vocab=128, sequence=32, batch=2)
DROPPED = 1
"""The step in which a side was frozen. Reading takes so little of a step that what is read ahead shows nowhere."""

SIDES = ("by hand", "ftlaunch")


def measure(strategy: str, folder: Path, size: Size, options: argparse.Namespace) -> list[Table]:
    """Tokens/s of all ranks by the mean step of a turn; processor time, which a busy machine disturbs less."""
    cpu: Rounds = {}

    def turn(name: str, side: Side) -> float:
        taken = side.turn()
        cpu.setdefault(name, []).append(taken.cpu_s / len(taken.seconds))
        return RANKS * size.batch * size.sequence / statistics.mean(taken.seconds)

    with contextlib.ExitStack() as stack:
        turns = {}
        for name in SIDES:
            side = Side(
                f"{strategy} {name}", folder, "cpu", size, options.steps, dropped=DROPPED, script="strategy_sides.py"
            )
            turns[name] = partial(turn, name, stack.enter_context(contextlib.closing(side)))
        rates = interleave(turns, options.rounds, strategy)
    return [
        Table(f"{strategy}, {RANKS} ranks", "tokens/s", "by hand", rates),
        Table(f"{strategy}: processor time of both ranks", "s a step", "by hand", cpu),
    ]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--strategies", nargs="+", choices=BY_HAND, default=list(BY_HAND))
    parser.add_argument("--steps", type=int, default=2, help="measured steps in a turn")
    options = parse(parser)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # frozen sides would outlive it
    size = TINY if options.quick else SIZE
    tables: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="step-strategies-") as place:
        folder = Path(place) / "inputs"
        write_inputs(folder, size, options.seed)
        for strategy in options.strategies:
            tables += measure(strategy, folder, size, options)
    settings = {**asdict(size), "ranks": RANKS, "steps_a_turn": options.steps, "dropped_steps_a_turn": DROPPED}
    write_results("step_strategies", options, CLAIM, tables, settings)


if __name__ == "__main__":
    main()
