"""What does it cost to keep packed samples apart? Training steps on a GPU over packed documents of log-normal lengths.

`variable length`: `model.attention: auto`, which takes torch's variable-length attention; `mask`: sdpa with a mask over
all pairs of positions; `padded`: one document a sequence, unmasked. All are whole ranks, frozen except in their turn.
Tokens are those of documents, padding left out. The limit is attention that is not told where samples start, which
would be wrong.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from harness import Table, arguments, interleave, parse, write_results
from step_overhead import DROPPED, Side
from workload import Size, write_documents, write_model

CLAIM = "Tokens/s of packed documents: variable-length attention against sdpa with masks, and against padding."
SIDES = {"mask": "packed_sdpa", "variable length": "packed_auto", "padded": "padded"}
SIZE = Size(hidden=2048, layers=8, vocab=32_768, sequence=2048, batch=16_384)
"""`batch`: tokens of a step, however long its sequences."""

QUICK = Size(hidden=64, layers=1, vocab=128, sequence=64, batch=256)


def tokens_per_s(side: Side) -> float:
    """Documents' tokens a second in one turn."""
    turn = side.turn()
    return statistics.median(tokens / seconds for tokens, seconds in zip(turn.tokens, turn.seconds, strict=True))


def measure(names: Sequence[str], folder: Path, device: str, size: Size, rounds: int, steps: int) -> Table:
    """All sides at one sequence length."""
    title = f"Sequences of {size.sequence} tokens, documents of {WORDS} in the median"
    with contextlib.ExitStack() as stack:
        sides = {
            name: stack.enter_context(contextlib.closing(Side(SIDES[name], folder, device, size, steps)))
            for name in names
        }
        rates = interleave({name: partial(tokens_per_s, side) for name, side in sides.items()}, rounds, title)
    return Table(title, "tokens/s", "mask", rates)


WORDS = 400


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--sequences", type=int, nargs="+", default=[4096, 16_384])
    parser.add_argument("--steps", type=int, default=10, help="measured steps in a turn")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parse(parser)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # frozen sides would outlive it
    tables = []
    whole = QUICK if options.quick else SIZE
    with tempfile.TemporaryDirectory(prefix="packed-attention-") as place:
        for sequence in [QUICK.sequence] if options.quick else options.sequences:
            size = replace(whole, sequence=sequence, batch=max(1, whole.batch // sequence))
            folder = Path(place) / str(sequence)
            folder.mkdir()
            write_model(folder / "model", size, options.seed)
            write_documents(folder / "text.jsonl", size, 256 if options.quick else 4096, WORDS, options.seed)
            tables.append(measure(options.sides, folder, options.device, size, options.rounds, options.steps))
    settings = {**asdict(whole), "device": options.device, "dropped_steps_a_turn": DROPPED, "steps": options.steps}
    write_results("packed_attention", options, CLAIM, tables, settings)


if __name__ == "__main__":
    main()
