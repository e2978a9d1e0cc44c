"""Opening the order of a data set of 10^12 rows in 100,000 files: seconds and megabytes, however far the epoch is.

The index is synthetic: only its arrays count, no file is there. One row is drawn at positions throughout the epoch, as
resuming does.

python benchmarks/order_scale.py [--quick]
"""

from __future__ import annotations

import resource
import sys
import time

import harness
import numpy as np

from ftlaunch.distributed.data.order import LaneOrder, permute, slice_rows

ROWS_PER_BLOCK = 1_000_000
BYTES_PER_ROW = 2_000
CLAIM = (
    "The order is computed, never stored: opening a stream costs a permutation of the blocks, and a position costs the "
    "same anywhere in an epoch. Against the list of all row ids that other loaders make at each start (8 bytes a row)."
)


def open_and_draw(files: int, blocks_per_file: int, at: float) -> tuple[float, int]:
    """Seconds to open stream 3 of 16 at a share of the epoch and find its next rows, and the rows of the data set."""
    rng = np.random.default_rng(0)
    rows = rng.integers(ROWS_PER_BLOCK // 2, ROWS_PER_BLOCK * 3 // 2, files * blocks_per_file)
    nbytes = rows * BYTES_PER_ROW
    start = time.perf_counter()
    order = LaneOrder("a", nbytes, streams=16, seed=0, shuffle=True)
    segment = order.segment(3, 1)
    piece = segment[int(at * (len(segment) - 1))]
    found = slice_rows(piece, int(nbytes[piece.block]), int(rows[piece.block]))
    row = permute(np.arange(8), len(found), 5)
    assert len(set(row.tolist())) == 8
    return time.perf_counter() - start, int(rows.sum())


def measure(files: int, blocks_per_file: int, at: float, what: str) -> float:
    """In a process of its own: seconds, or megabytes at the peak, which begin with Python's and numpy's own."""
    words = [sys.executable, __file__, "--one", str(files), str(blocks_per_file), str(at)]
    seconds, megabytes = harness.run_checked(words, harness.ROOT.parent).split()
    return float(seconds if what == "seconds" else megabytes)


def one(files: int, blocks_per_file: int, at: float) -> None:
    """The other process."""
    open_and_draw(1, 1, 0.0)
    seconds, _ = open_and_draw(files, blocks_per_file, at)
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Small and large, early and late."""
    if sys.argv[1:2] == ["--one"]:
        one(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
        return
    options = harness.parse(harness.arguments(__doc__ or ""))
    large = 1_000 if options.quick else 100_000
    cases = {
        f"{large:,} files, at 1 %": (large, 10, 0.01),
        f"{large:,} files, at 50 %": (large, 10, 0.5),
        f"{large:,} files, at 99 %": (large, 10, 0.99),
        f"{large // 100:,} files, at 50 %": (large // 100, 10, 0.5),
    }
    base = next(iter(cases))
    tables = [
        harness.Table(
            what,
            what,
            base,
            harness.interleave(
                {name: lambda case=case, what=what: measure(*case, what) for name, case in cases.items()},
                options.rounds,
                what,
            ),
        )
        for what in ("seconds", "megabytes")
    ]
    _, rows = open_and_draw(large, 10, 0.0)
    settings = {"rows": rows, "files": large, "blocks": 10 * large, "bytes": rows * BYTES_PER_ROW}
    settings["list_of_ids_megabytes"] = rows * 8 / 2**20
    harness.write_results("order_scale", options, CLAIM, tables, settings)


if __name__ == "__main__":
    main()
