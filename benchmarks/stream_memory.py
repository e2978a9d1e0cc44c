"""Does a rank's memory stay flat over a long stream? Resident memory of the rank and its readers, for many epochs.

The stream reads many files in shuffled, packed, weighted epochs, in a thread and in reader processes, each in a process
of its own. Proportional set sizes are summed, so that what both sides of a shared mapping see counts once. Pages of
files are left out: of a library's, a process's share changes when any other process on the machine comes or goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from harness import Table, arguments, write_results
from workload import Size, write_text, write_tokenizer

CLAIM = (
    "Memory over a long stream is flat: the median of the last quarter of the samples against that of the second "
    "quarter (1 is flat; the first quarter fills caches)."
)
SIZE = Size(hidden=0, layers=0, vocab=4096, sequence=512, batch=16)
FILES, ROWS = 120, 60
SAMPLES = 80


def write_sources(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Two weighted folders of JSON lines, of documents of several lengths."""
    write_tokenizer(folder, SIZE.vocab)
    for number in range(FILES):
        words = Size(0, 0, SIZE.vocab, 32 + 37 * number % 900, 1)
        place = folder / ("a" if number % 3 else "b")
        place.mkdir(exist_ok=True)
        write_text(place / f"{number:03}.jsonl", words, ROWS, seed + number)
    return [
        {"path": str(folder / name), "format": "text", "weight": weight} for name, weight in (("a", 0.7), ("b", 0.3))
    ]


def read(folder: Path, sources: list[dict[str, Any]], readers: int, steps: int) -> list[int]:
    """Memory [bytes] of rank and readers at even distances of a stream of so many steps."""
    from ftlaunch.distributed.data.build import build_index
    from ftlaunch.distributed.data.stream import open_stream
    from ftlaunch.distributed.row_encoder import EncoderSpec, open_encoder
    from ftlaunch.recipes.schema import Recipe

    sections = {
        "name": "memory",
        "model": {"path": str(folder)},
        "method": {"type": "cpt"},
        "data": {"train": sources, "sequence_length": SIZE.sequence},
        "train": {"global_batch_size": SIZE.batch, "micro_batch_size": 4, "max_steps": steps},
    }
    recipe = Recipe.model_validate(sections)
    encode = open_encoder(EncoderSpec(recipe.method, str(folder), None, {}, datetime.now(UTC), None))
    stream = open_stream(
        index=build_index(recipe.data.train, ["a", "b"]),
        recipe=recipe,
        world_rank=0,
        world_size=1,
        streams=SIZE.batch,
        encode=encode,
        collate=encode.method.collate,
        reader_processes=readers,
    )
    family = psutil.Process()
    samples = []
    with closing(stream):
        for step in range(1, steps + 1):
            stream.next_step()
            if step % (steps // SAMPLES) == 0:
                samples.append(sum(map(written_memory, (family, *family.children()))))
    return samples


def written_memory(process: psutil.Process) -> int:
    """Memory [bytes] that a process has written, and its share of what it has written with others."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    kibibytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    return (kibibytes["Pss_Anon"] + kibibytes["Pss_Shmem"]) * 1024


def measure(folder: Path, readers: int, steps: int, seed: int) -> list[int]:
    """The samples of one process."""
    words = [sys.executable, __file__, "--inside", str(folder), str(readers), str(steps), str(seed)]
    return list(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def quarters(samples: list[int]) -> list[float]:
    """Medians of the samples' quarters [MiB]."""
    size = len(samples) // 4
    return [statistics.median(samples[at * size : (at + 1) * size]) / 2**20 for at in range(4)]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=12_000, help="steps of each stream")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        folder, readers, steps, seed = options.inside
        sources = write_sources(Path(folder), int(seed))
        print(json.dumps(read(Path(folder), sources, int(readers), int(steps))))
        return
    options.rounds, steps = 1, 160 if options.quick else options.steps
    tables, samples = [], {}
    for name, readers in (("a thread", 0), ("2 reader processes", 2)):
        with tempfile.TemporaryDirectory(prefix="stream-memory-") as place:
            samples[name] = measure(Path(place), readers, steps, options.seed)
        _, second, _, last = quarters(samples[name])
        tables.append(
            Table(f"Read by {name}", "MiB", "second quarter", {"second quarter": [second], "last quarter": [last]})
        )
    settings = {"steps": steps, "files": FILES, "rows": FILES * ROWS, "samples_bytes": samples}
    write_results("stream_memory", options, CLAIM, tables, settings)


if __name__ == "__main__":
    main()
