"""Does the training loop cost anything? Steps of our whole rank's program against a bare torch loop and HF Trainer.

The same model, tokens per step, dtype, optimizer and number of threads; the bare loop and the Trainer have their
tokens ready, ours reads and tokenises text in the background. Every side lives in a process of its own, with its
readers, for the whole benchmark and is frozen (SIGSTOP) while others have their turn. The limit is the bare loop.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from harness import Rounds, Table, arguments, interleave, parse, write_results
from workload import Size, write_model, write_text

CLAIM = (
    "Tokens/s of our loop against a bare torch loop (1 is as fast): at least 0.97 at steps of about 300 ms, at least "
    "0.9 at about 30 ms, and more than HF Trainer."
)
SIZES = {
    "cpu": {
        300: Size(hidden=256, layers=6, vocab=4096, sequence=256, batch=1),
        30: Size(hidden=128, layers=2, vocab=1024, sequence=128, batch=1),
    },
    "cuda": {
        300: Size(hidden=2048, layers=8, vocab=32_768, sequence=2048, batch=1),
        30: Size(hidden=1024, layers=8, vocab=32_768, sequence=1024, batch=1),
    },
}
TINY = Size(hidden=64, layers=1, vocab=128, sequence=32, batch=2)
DROPPED = 20
"""More steps than a reader keeps ready."""

SIDES = ("bare", "hf_trainer", "ddp", "fsdp")
ROWS = 512


@dataclass(frozen=True)
class Turn:
    """Seconds and tokens of each step (tokens: 0 where the side does not count them), the processor time of all, and
    the peak of GPU memory up to now (0 on a CPU)."""

    seconds: list[float]
    tokens: list[int]
    cpu_s: float
    peak_bytes: int


class Side:
    """A process that trains, with its children, frozen except in its turn."""

    def __init__(
        self,
        name: str,
        folder: Path,
        device: str,
        size: Size,
        measured: int,
        *,
        dropped: int = DROPPED,
        script: str = "step_sides.py",
    ) -> None:
        here = Path(__file__).resolve().parent
        numbers = map(str, (size.batch, size.sequence, dropped, measured))
        self.name = name
        self._log = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(here / script), name, str(folder), device, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=folder,
            text=True,
            start_new_session=True,
        )
        self._answer()  # the first turn warms up

    def turn(self) -> Turn:
        """Let it train for one turn."""
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Turn:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("turn "):
            self._log.seek(0)
            raise SystemExit(f"{self.name} ended before its turn did:\n{self._log.read()[-4000:]}")
        os.killpg(self._process.pid, signal.SIGSTOP)
        return Turn(**json.loads(line.removeprefix("turn ")))

    def close(self) -> None:
        """End the process and wait for it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()


def calibrate(folder: Path, device: str, size: Size, target_s: float, seed: int) -> Size:
    """The batch with which a step of the bare loop comes nearest to `target_s`, told by the fastest steps: others' work
    on a shared machine must not make the batch smaller."""
    write_inputs(folder, size, seed)
    seconds = {}
    for batch in (1, 4):
        with contextlib.closing(Side("bare", folder, device, replace(size, batch=batch), 10)) as side:
            seconds[batch] = min(side.turn().seconds)
    per_sequence = max(1e-6, (seconds[4] - seconds[1]) / 3)
    return replace(size, batch=max(1, round(1 + (target_s - seconds[1]) / per_sequence)))


def sized(folder: Path, step_ms: int, options: argparse.Namespace) -> Size:
    """What a step of so many milliseconds works on."""
    return calibrate(folder, options.device, SIZES[options.device][step_ms], step_ms / 1000, options.seed)


def write_inputs(folder: Path, size: Size, seed: int) -> None:
    """Model and text, once."""
    if not (folder / "model").exists():
        folder.mkdir(parents=True)
        write_model(folder / "model", size, seed)
        write_text(folder / "text.jsonl", size, ROWS, seed)


@dataclass
class Measured:
    """Per step, by side and round: the median and the mean of a turn's steps, and the mean processor time [s]."""

    median: Rounds = field(default_factory=dict)
    mean: Rounds = field(default_factory=dict)
    cpu: Rounds = field(default_factory=dict)

    def take_turn(self, side: Side) -> float:
        """Measure one turn; the median step."""
        turn = side.turn()
        self.mean.setdefault(side.name, []).append(statistics.mean(turn.seconds))
        self.cpu.setdefault(side.name, []).append(turn.cpu_s / len(turn.seconds))
        return statistics.median(turn.seconds)


def measure(
    names: Sequence[str], folder: Path, device: str, size: Size, rounds: int, steps: int, title: str
) -> Measured:
    """All sides of one setting."""
    measured = Measured()
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(contextlib.closing(Side(name, folder, device, size, steps))) for name in names]
        turns = {side.name: partial(measured.take_turn, side) for side in sides}
        measured.median = interleave(turns, rounds, title)
    return measured


def tables(title: str, size: Size, measured: Measured) -> list[Table]:
    """Tokens/s by the median and by the mean step; processor time, which a busy machine disturbs less."""
    tokens = size.batch * size.sequence
    rates = {"median": measured.median, "mean": measured.mean}
    return [
        *(
            Table(f"{title}: {tokens} tokens, by the {kind} step of a turn", "tokens/s", "bare", as_rate(tokens, steps))
            for kind, steps in rates.items()
        ),
        Table(f"{title}: processor time, background reading included", "s a step", "bare", measured.cpu),
    ]


def as_rate(tokens: int, seconds: Rounds) -> Rounds:
    return {name: [tokens / value for value in values] for name, values in seconds.items()}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--step-ms", type=int, nargs="+", default=[300, 30], choices=[300, 30])
    parser.add_argument("--device", choices=sorted(SIZES), default="cpu", help="cuda: in bfloat16, on one GPU")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--turn-s", type=float, default=6.0, help="seconds of measured steps in a turn")
    options = parse(parser)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # frozen sides would outlive it
    results: list[Table] = []
    settings = {}
    with tempfile.TemporaryDirectory(prefix="step-overhead-") as place:
        for step_ms in [1] if options.quick else options.step_ms:
            folder = Path(place) / str(step_ms)
            size = TINY if options.quick else sized(folder, step_ms, options)
            write_inputs(folder, size, options.seed)
            steps = 5 if options.quick else max(10, round(options.turn_s * 1000 / step_ms))
            title = "The smallest steps" if options.quick else f"Steps of about {step_ms} ms"
            measured = measure(options.sides, folder, options.device, size, options.rounds, steps, title)
            results += tables(title, size, measured)
            settings[title] = {**asdict(size), "steps_a_turn": steps, "dropped_steps_a_turn": DROPPED}
    name = "step_overhead" if options.device == "cpu" else f"step_overhead_{options.device}"
    write_results(name, options, CLAIM, results, settings)


if __name__ == "__main__":
    main()
