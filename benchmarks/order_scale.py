"""Opening the order of a data set of 10^12 rows in 100,000 files: seconds and megabytes, however far the epoch is.

The index is synthetic: no file is there. What is timed is what a rank does when it starts: read the index from the run
directory, lay out the order, and find the rows at a position anywhere in the epoch, as resuming does.

python benchmarks/order_scale.py [--quick]
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import harness
import numpy as np

from ftlaunch.distributed.data.block import ALL_ROWS
from ftlaunch.distributed.data.index import Index, SourceInfo
from ftlaunch.distributed.data.lane_plan import plan_lanes
from ftlaunch.distributed.data.order import permute, slice_rows
from ftlaunch.distributed.storage import FileInfo
from ftlaunch.recipes.schema import Data, Train, TrainSource

ROWS_PER_BLOCK = 1_000_000
BYTES_PER_ROW = 2_000
BLOCKS_PER_FILE = 10
CLAIM = (
    "The order is computed, never stored: opening a stream costs reading the index and a permutation of its blocks, "
    "and a position costs the same anywhere in an epoch. A list of all row ids, which other loaders make at each "
    "start, would take 8 bytes a row."
)


def make_index(folder: Path, files: int, rng: np.random.Generator) -> int:
    """Write the index of files of ten blocks each; the rows of the data set."""
    rows = rng.integers(ROWS_PER_BLOCK // 2, ROWS_PER_BLOCK * 3 // 2, files * BLOCKS_PER_FILE)
    sizes = (rows * BYTES_PER_ROW).reshape(files, BLOCKS_PER_FILE)
    starts = np.cumsum(sizes, axis=1) - sizes
    names = [f"s3://bucket/corpus/part-{number:06}.parquet" for number in range(files)]
    Index(
        (SourceInfo("corpus", "text", {}),),
        tuple(FileInfo(name, int(size), f"{size:x}") for name, size in zip(names, sizes.sum(axis=1), strict=True)),
        ("parquet",) * files,
        np.zeros(files, np.int64),
        np.repeat(np.arange(files), BLOCKS_PER_FILE),
        starts.reshape(-1),
        sizes.reshape(-1),
        rows,
        np.zeros(len(rows), np.int64),
        np.full(len(rows), ALL_ROWS),
    ).save(str(folder), "train")
    return int(rows.sum())


def open_at(folder: str, at: float) -> float:
    """Seconds to open stream 3 of 16 at a share of its epoch, and to find some of the rows that come there."""
    start = time.perf_counter()
    index = Index.load(folder, "train")
    data = Data(train=(TrainSource(path="s3://bucket/corpus", format="text"),))
    (plan,) = plan_lanes(index, data, Train(), 16)
    segment = plan.order.segment(3, 1)
    window = segment.window(int(at * (len(segment) - 1)))
    rows = [
        slice_rows(piece, plan.order.block_bytes(piece.block), int(index.block_rows[piece.block])) for piece in window
    ]
    total = sum(map(len, rows))
    found = permute(np.arange(64), total, 5)
    seconds = time.perf_counter() - start
    assert len(set(found.tolist())) == 64
    return seconds


def measure(folder: Path, at: float, what: str) -> float:
    """In a process of its own: seconds, or megabytes at the peak, which begin with Python's and numpy's own."""
    words = [sys.executable, __file__, "--one", str(folder), str(at)]
    seconds, megabytes = harness.run_checked(words, folder).split()
    return float(seconds if what == "seconds" else megabytes)


def one(folder: str, at: float) -> None:
    """The other process."""
    seconds = open_at(folder, at)
    # Not ru_maxrss, which a child process inherits from its parent.
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(seconds, int(peak.split()[1]) / 1024)


def main() -> None:
    """Small and large, early and late."""
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], float(sys.argv[3]))
        return
    options = harness.parse(harness.arguments(__doc__ or ""))
    rng = np.random.default_rng(options.seed)
    large = 1_000 if options.quick else 100_000
    with tempfile.TemporaryDirectory() as place:
        rows, cases = {}, {}
        for files, shares in ((large, (0.01, 0.5, 0.99)), (large // 100, (0.5,))):
            folder = Path(place) / str(files)
            folder.mkdir()
            rows[files] = make_index(folder, files, rng)
            cases |= {f"{files:,} files, at {share:.0%}": (folder, share) for share in shares}
        tables = [_table(cases, what, options.rounds) for what in ("seconds", "megabytes")]
    settings = {"files": large, "blocks": BLOCKS_PER_FILE * large, "rows": rows[large]}
    settings |= {"bytes": rows[large] * BYTES_PER_ROW, "list_of_ids_megabytes": rows[large] * 8 / 2**20}
    harness.write_results("order_scale", options, CLAIM, tables, settings)


def _table(cases: dict[str, tuple[Path, float]], what: str, rounds: int) -> harness.Table:
    sides = {name: partial(measure, *case, what) for name, case in cases.items()}
    return harness.Table(what, what, next(iter(cases)), harness.interleave(sides, rounds, what))


if __name__ == "__main__":
    main()
