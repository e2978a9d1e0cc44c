"""How long does it take to go on at another world size, and how much memory and reading?

Two ranks save one state (random weights in bfloat16 and fp32, AdamW's moments) in three formats; then ranks of each
world size fill engines that are there already. Ours, as a run resumes (every byte held against its checksum), under
fsdp and ZeRO-3; `dcp.load` into FSDP2, which reshards; DeepSpeed's own `load_checkpoint`, which knows the world size it
saved at only, and for all others a conversion to a universal checkpoint and its load, timed together. The limit is a
raw read of the bytes of our files by the same ranks. All read from the page cache, where it has room for them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint_save import model_config
from harness import Rounds, Table, arguments, interleave, parse, write_results
from load_ranks import SIDES, WRITERS, Turn, serve

CLAIM = (
    "A checkpoint of 2 ranks is gone on with at any world size, without a conversion, each rank holding what it reads "
    "against its checksum: at most 1.25 of the bytes needed are read (dcp.load: up to 2) with no more memory, at "
    "another world size in less time, and in a tenth of the time of DeepSpeed's universal checkpoints."
)
SAVED_BY = 2
FORMATS = {"raw": "ours", "ours_fsdp": "ours", "ours_zero3": "ours", "dcp": "dcp"}
"""Side -> whose files it reads; all others read DeepSpeed's."""


@dataclass
class Group:
    """Turns of one world size, each in processes of its own (DeepSpeed's engines are never freed), and what they showed
    besides seconds."""

    size: int
    model: str
    place: str
    seed: int
    needed: dict[str, int] = field(default_factory=dict)
    read: Rounds = field(default_factory=dict)
    peak: Rounds = field(default_factory=dict)
    extra: Rounds = field(default_factory=dict)
    digests: dict[str, float] = field(default_factory=dict)

    def turn(self, side: str) -> float:
        """One load: seconds of the slowest rank."""
        turns: list[Turn] = self.tell(f"load {side}")
        read = sum(turn.read_bytes for turn in turns) / self.needed[FORMATS.get(side, "deepspeed")]
        for table, value in (
            (self.read, read),
            (self.peak, max(turn.peak_bytes for turn in turns) / 2**20),
            (self.extra, max(1.0, max(turn.extra_bytes for turn in turns) / 2**20)),
        ):
            table.setdefault(side, []).append(value)
        self._check(side, turns[0].digest)
        return max(turn.seconds for turn in turns)

    def _check(self, side: str, digest: float) -> None:
        """All sides must have loaded the same numbers, summed up in other orders."""
        if side != "raw":
            self.digests[side] = digest
            first = next(iter(self.digests.values()))
            assert abs(digest - first) <= 1e-9 * abs(first), f"{side} loaded other values: {digest}, not {first}"

    def tell(self, words: str) -> list[Any]:
        """Every rank does it; what they answer."""
        context = multiprocessing.get_context("fork")  # what is imported is imported once
        meeting = tempfile.mktemp(prefix="rendezvous-", dir=self.place)
        lines, processes = [], []
        for rank in range(self.size):
            here, there = context.Pipe(duplex=False)
            about = (rank, self.size, self.model, self.place, meeting, self.seed)
            processes.append(context.Process(target=serve, args=(*about, words, there)))
            processes[-1].start()
            there.close()
            lines.append(here)
        try:
            return [line.recv() for line in lines]
        except EOFError as error:
            for process in processes:
                process.kill()
            raise SystemExit(f"a rank died in {words!r} at world size {self.size}") from error
        finally:
            for process in processes:
                process.join()


def measure(
    size: int, sides: Sequence[str], needed: dict[str, int], options: argparse.Namespace, place: str
) -> list[Table]:
    """All sides at one world size; one turn each before those that count."""
    title = f"saved by {SAVED_BY}, loaded by {size}"
    sides = [side for side in sides if side != "deepspeed" or size == SAVED_BY]
    group = Group(size, f"{place}/model", place, options.seed, needed)
    turns = {side: partial(group.turn, side) for side in sides}
    if not options.quick:
        interleave(turns, 1, f"{title}, to warm up")
        group.read, group.peak, group.extra = {}, {}, {}
    seconds = interleave(turns, options.rounds, title)
    base = "raw" if "raw" in sides else sides[0]
    loads = [side for side in sides if side != "raw"]
    found = [
        Table(f"{title}: seconds", "s", base, seconds),
        Table(f"{title}: bytes read / bytes needed, all ranks", "1", loads[0], {s: group.read[s] for s in loads}),
        Table(f"{title}: peak memory of the worst rank", "MiB", loads[0], {s: group.peak[s] for s in loads}),
        Table(f"{title}: memory above what it holds in the end", "MiB", loads[0], {s: group.extra[s] for s in loads}),
    ]
    return [table for table in found if len(table.values) > 1]


def write_all(formats: Sequence[str], options: argparse.Namespace, place: str) -> dict[str, int]:
    """The state in each format; the bytes of each one's tensors."""
    model = Path(place) / "model"
    model.mkdir()
    config = model_config(options.parameters * 1e9, tied=True, quick=options.quick)
    about = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (model / "config.json").write_text(json.dumps({**config, **about}))
    for name in formats:
        Group(SAVED_BY, str(model), place, options.seed).tell(f"write {name}")
    return {name: _stored(Path(place) / name) for name in formats}


def _stored(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--parameters", type=float, default=0.25, help="of the model, in billions")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--place", type=Path, help="folder to write to; by default the temporary one")
    parser.add_argument("--name", default="checkpoint_load", help="of the results' files")
    parser.add_argument("--keep", action="store_true", help="keep tables of other world sizes that NAME.json has")
    options = parse(parser)
    os.environ["OMP_NUM_THREADS"] = "1"
    formats = [name for name in WRITERS if name in {FORMATS.get(side, "deepspeed") for side in options.sides}]
    tables: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="checkpoint-load-", dir=options.place) as place:
        needed = write_all(formats, options, place)
        for size in options.ranks:
            tables += measure(size, options.sides, needed, options, place)
    tables = sorted([*(kept(options, tables) if options.keep else ()), *tables], key=lambda table: table.title)
    write_results(options.name, options, CLAIM, tables, {"bytes": needed, "parameters": options.parameters})


def kept(options: argparse.Namespace, fresh: Sequence[Table]) -> Iterator[Table]:
    """What an earlier run found at other world sizes: all of them together take longer than a machine may be held."""
    path = options.out / f"{options.name}.json"
    titles = {table.title for table in fresh}
    for table in json.loads(path.read_text())["tables"] if path.exists() else ():
        if table["title"] not in titles:
            yield Table(table["title"], table["unit"], table["base"], table["values"])


if __name__ == "__main__":
    main()
