"""How long does a save take, and how long does it hold training up?

Ranks over gloo hold the shards of a random model and write it in its final form, to a local disk or to an object store
on loopback: weights in bfloat16, or with masters and both moments in float32. The peers are DCP with consolidation,
torch's HuggingFaceStorageWriter, a gather to rank 0 with `save_pretrained`, and DeepSpeed's checkpoint with its
conversion (which knows only the whole state). The limit is a raw write of the same bytes from memory by the same ranks
into files of their own, synced, as ours are; of peers' files the sync is counted too. On the object store it is a raw
multipart upload, and what peers can only write to a disk they upload from there. Of a save in the background the time
until training may go on is held against a copy of the same bytes in memory, and against `dcp.async_save`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import object_uploads
from harness import Rounds, Table, arguments, interleave, parse, write_results
from save_ranks import Setting, Turn, serve

CLAIM = (
    "Seconds of a save / a raw write of the same bytes from memory by the same ranks to the same place: at most 2.5, "
    "aim 1.5; at least {dcp} as fast as DCP with consolidation and twice as fast as a gather to rank 0; at most 64 MiB "
    "more per rank; model bytes are written once."
)
STALL_CLAIM = " In the background: training is held up for at most 2 copies of the bytes."
DCP = {("disk", "weights"): "5 times"}
"""How much faster than DCP, by target and content; elsewhere twice: uploads and fp32 state take both sides longer."""

SAVES = {
    ("disk", "weights"): (
        "raw",
        "ours",
        "ours_streamed",
        "rank_0_gather",
        "dcp_consolidated",
        "hf_storage_writer",
    ),
    ("disk", "state"): ("raw", "ours", "ours_streamed", "zero_to_fp32", "rank_0_gather", "dcp_consolidated"),
    ("s3", "weights"): ("raw_upload", "ours_uploaded", "rank_0_gather_uploaded", "dcp_consolidated_uploaded"),
    ("s3", "state"): ("raw_upload", "ours_uploaded", "rank_0_gather_uploaded", "dcp_consolidated_uploaded"),
}
"""Sides of each target and content, the limit first and then ours."""

STALLS = ("memcpy", "ours_async", "dcp_async_thread", "dcp_async_process")
PARAMETERS = {"weights": 1.0, "state": 0.25}
"""Of the model, in billions."""

LAYER_PARAMETERS = 60_821_504
"""Of a layer of the model that is drawn: hidden 2048, intermediate 8192, 32 heads, 8 of keys and values."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


def model_config(parameters: float, *, tied: bool, quick: bool) -> dict[str, Any]:
    """A Llama of about so many parameters."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": tied}
    if quick:
        return {**heads, **TINY}
    vocabulary = 32_000
    embeddings = vocabulary * 2048 * (1 if tied else 2)
    layers = max(1, round((parameters - embeddings) / LAYER_PARAMETERS))
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
    def start(cls, setting: Setting) -> Ranks:
        """Ready for their first turn."""
        context = multiprocessing.get_context("spawn")
        processes, lines = [], []
        for rank in range(setting.size):
            here, there = context.Pipe()
            processes.append(context.Process(target=serve, args=(rank, setting, there)))
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


@contextlib.contextmanager
def target(kind: str, place: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Where is saved to, and the environment that it takes."""
    if kind == "disk":
        yield place, {}
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    root = Path(place) / "store"
    (root / "bucket").mkdir(parents=True)
    server = context.Process(target=object_uploads.serve, args=(root,), kwargs={"line": there})
    server.start()
    try:
        yield "s3://bucket", {"AWS_ENDPOINT_URL": here.recv(), **CREDENTIALS}
    finally:
        server.terminate()
        server.join()


def measure(size: int, sides: Sequence[str], options: argparse.Namespace) -> tuple[list[Table], dict[str, Any]]:
    """All sides at one world size. Every side of stalls, and DeepSpeed's, has one turn before those that count: buffers
    and processes are made."""
    # zero_to_fp32 --safe_serialization refuses a head that is tied to the embeddings.
    config = model_config(options.parameters * 1e9, tied=options.content == "weights", quick=options.quick)
    with (
        tempfile.TemporaryDirectory(prefix="checkpoint-save-", dir=options.place) as place,
        target(options.target, place) as (url, environment),
    ):
        ranks = Ranks.start(Setting(size, config, options.content, options.seed, place, url, environment))
        title = f"{ranks.model_bytes / 1e9:.3g} GB of {options.content} on {size} ranks, {options.target}"
        turns = {side: partial(ranks.turn, side) for side in sides}
        with contextlib.closing(ranks):
            interleave({side: turns[side] for side in sides if is_warmed_up(side)}, 1, f"{title}, to warm up")
            ranks.forget()
            values = interleave(turns, options.rounds, title)
    about = {"model_bytes": ranks.model_bytes, "written / model bytes": ranks.written, "config": config}
    return tables(title, values, ranks.extra), {title: about}


def is_warmed_up(side: str) -> bool:
    """What is made once a run is nobody's save: staging memory, worker processes, clients of stores, an engine."""
    return side in STALLS or side == "zero_to_fp32" or "upload" in side


def tables(title: str, values: Rounds, extra: Rounds) -> list[Table]:
    """Seconds of saves, memory for them, seconds of stalls."""
    stalls = {side: values[side] for side in STALLS if side in values}
    saves = {side: values[side] for side in values if side not in STALLS}
    found = []
    if saves:
        limit = next(iter(saves))
        memory = {side: [max(value, 1.0) for value in extra[side]] for side in saves if side != limit}
        found.append(Table(f"{title}: a save", "s", limit, saves))
        found.append(Table(f"{title}: memory that the worst rank takes besides", "MiB", next(iter(memory)), memory))
    if stalls:
        found.append(Table(f"{title}: how long training is held up", "s", "memcpy", stalls))
    return [table for table in found if len(table.values) > 1]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--target", choices=("disk", "s3"), default="disk", help="where is saved to")
    parser.add_argument("--content", choices=tuple(PARAMETERS), default="weights", help="what is saved")
    parser.add_argument("--parameters", type=float, help="of the model, in billions")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sides", nargs="+", help="some of the sides only; the limit must be among them")
    parser.add_argument("--place", type=Path, help="folder to write to; by default the temporary one")
    parser.add_argument("--name", default="checkpoint_save", help="of the results' files")
    options = parse(parser)
    options.parameters = options.parameters or PARAMETERS[options.content]
    has_stalls = (options.target, options.content) == ("disk", "weights")
    stalls = STALLS if has_stalls else ()
    claim = CLAIM.format(dcp=DCP.get((options.target, options.content), "twice")) + STALL_CLAIM * has_stalls
    known = (*SAVES[options.target, options.content], *stalls)
    if unknown := set(options.sides or ()) - set(known):
        parser.error(f"no side of this setting: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    results: list[Table] = []
    settings: dict[str, Any] = {}
    for size in options.ranks:
        found, about = measure(size, [side for side in known if side in (options.sides or known)], options)
        results += found
        settings |= about
    write_results(options.name, options, claim, results, settings)


if __name__ == "__main__":
    main()
