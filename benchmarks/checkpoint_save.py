"""How long does a save take, and how long does it hold training up?

Ranks over gloo hold the shards of a random model in bfloat16 and write it to a local disk in its final form: ours
against DCP with consolidation, torch's HuggingFaceStorageWriter, and a gather to rank 0 with `save_pretrained`. The
limit is a raw write of the same bytes from memory by the same ranks into files of their own, synced, as ours are; of
peers' files the sync is counted too. Of a save in the background the time until training may go on is held against
a copy of the same bytes in memory, and against `dcp.async_save`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness import Rounds, Table, arguments, interleave, parse, write_results
from save_ranks import Turn, serve

CLAIM = (
    "Seconds of a save / a raw write of the same bytes from memory by the same ranks: at most 2.5, aim 1.5; at least 5 "
    "times faster than DCP with consolidation and twice as fast as a gather to rank 0; at most 64 MiB more per rank; "
    "model bytes are written once. In the background: training is held up for at most 2 copies of the bytes."
)
SAVE = ("raw", "ours", "ours_by_owners", "rank_0_gather", "dcp_consolidated", "hf_storage_writer")
STALL = ("memcpy", "ours_async", "dcp_async_thread", "dcp_async_process")
LAYER_PARAMETERS = 60_821_504
"""Of a layer of the model that is drawn: hidden 2048, intermediate 8192, 32 heads, 8 of keys and values."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}


def model_config(parameters: float, *, quick: bool) -> dict[str, Any]:
    """A Llama of about so many parameters."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
    if quick:
        return {**heads, **TINY}
    vocabulary = 32_000
    layers = max(1, round((parameters - vocabulary * 2048) / LAYER_PARAMETERS))
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {**heads, **sizes}


@dataclass
class Ranks:
    """Processes that hold the model, and what their turns showed: the slowest rank, and the one that grew most."""

    processes: list[Any]
    lines: list[Any]
    model_bytes: int
    extra: Rounds = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, size: int, config: Mapping[str, Any], seed: int, place: str) -> Ranks:
        """Ready for their first turn."""
        context = multiprocessing.get_context("spawn")
        processes, lines = [], []
        for rank in range(size):
            here, there = context.Pipe()
            processes.append(context.Process(target=serve, args=(rank, size, config, seed, place, there)))
            processes[-1].start()
            there.close()
            lines.append(here)
        return cls(processes, lines, sum(line.recv() for line in lines))

    def turn(self, side: str) -> float:
        """One save."""
        for line in self.lines:
            line.send(side)
        turns: list[Turn] = [line.recv() for line in self.lines]
        self.extra.setdefault(side, []).append(max(turn.extra_bytes for turn in turns) / 2**20)
        self.written[side] = turns[0].written_bytes / self.model_bytes
        return max(turn.seconds for turn in turns)

    def forget(self) -> None:
        """What was measured so far was to warm up."""
        self.extra.clear()

    def close(self) -> None:
        """Let them end."""
        for line in self.lines:
            line.close()
        for process in self.processes:
            process.join()


def measure(size: int, sides: Sequence[str], options: argparse.Namespace) -> tuple[list[Table], dict[str, Any]]:
    """All sides at one world size. Every side has one turn before those that count: buffers and processes are made."""
    config = model_config(options.parameters * 1e9, quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="checkpoint-save-", dir=options.place) as place:
        ranks = Ranks.start(size, config, options.seed, place)
        title = f"{ranks.model_bytes / 1e9:.3g} GB on {size} ranks"
        turns = {side: partial(ranks.turn, side) for side in sides}
        with contextlib.closing(ranks):
            interleave({side: turns[side] for side in sides if side in STALL}, 1, f"{title}, to warm up")
            ranks.forget()
            values = interleave(turns, options.rounds, title)
    about = {"model_bytes": ranks.model_bytes, "written / model bytes": ranks.written, "config": config}
    return tables(title, values, ranks.extra), {title: about}


def tables(title: str, values: Rounds, extra: Rounds) -> list[Table]:
    """Seconds of saves, memory for them, seconds of stalls."""
    saves, stalls = ({side: values[side] for side in group if side in values} for group in (SAVE, STALL))
    memory = {side: [max(value, 1.0) for value in extra[side]] for side in saves if side != "raw"}
    found = [
        Table(f"{title}: a save", "s", "raw", saves),
        Table(f"{title}: memory that the worst rank takes besides", "MiB", "ours", memory),
        Table(f"{title}: how long training is held up", "s", "memcpy", stalls),
    ]
    return [table for table in found if len(table.values) > 1]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--parameters", type=float, default=1.0, help="of the model, in billions")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sides", nargs="+", choices=(*SAVE, *STALL), default=(*SAVE, *STALL))
    parser.add_argument("--place", type=Path, help="folder to write to; by default the temporary one")
    parser.add_argument("--name", default="checkpoint_save", help="of the results' files")
    options = parse(parser)
    os.environ["OMP_NUM_THREADS"] = "1"
    results: list[Table] = []
    settings: dict[str, Any] = {}
    for size in options.ranks:
        found, about = measure(size, options.sides, options)
        results += found
        settings |= about
    write_results(options.name, options, CLAIM, results, settings)


if __name__ == "__main__":
    main()
