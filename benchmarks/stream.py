"""How fast do rows stream from object storage, how soon does the first batch come, how much is read?

All sides read the same rows from an S3 server on loopback whose link and round trip are set, shuffle, tokenise with
the same tokenizer and hand out batches; ftlaunch packs besides. Peers that need a format of their own got the rows
converted before. `bare` reads the files in order from a local disk in a plain loop: the limit where no link binds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from harness import Table, arguments, interleave, parse, write_results
from stream_bench import Shape, Turn, convert, serving, write_shards, write_tokenizer

CLAIM = (
    "Rows a second: at least 0.95 of the link or of the bare loop, whichever binds, and at least the best peer's. "
    "Bytes read / bytes needed: at most 1.05. The first batch: ahead of every peer."
)
PEERS = ["hf_datasets", "mosaic", "lit", "ray_data"]
SHAPE = Shape(files=24, groups=8, rows=250, words=100)
"""An epoch long enough that the start, which has a table of its own, does not decide about throughput."""
QUICK = Shape(files=2, groups=2, rows=50, words=40)
LATENCY_MS = 20.0


def first_and_rate(turn: Turn, side: str, seen: dict[str, list[dict[str, Any]]]) -> float:
    """Rows a second of an epoch; what else was measured is kept in `seen`."""
    measured = turn.take(side)
    if measured["rows"] != turn.shape.num_rows:
        raise SystemExit(f"{side} served {measured['rows']} of {turn.shape.num_rows} rows")
    seen.setdefault(side, []).append(measured)
    return float(measured["rows"] / measured["seconds"])


def tables(title: str, turn: Turn, sides: list[str], rounds: int, stored: int, limit: float | None) -> list[Table]:
    """Throughput, first batch and bytes of one setting. `limit`: the link's rows a second; None: `bare` is the base."""
    seen: dict[str, list[dict[str, Any]]] = {}
    turns: dict[str, Callable[[], float]] = {side: partial(first_and_rate, turn, side, seen) for side in sides}
    if limit is not None:
        turns = {"link": lambda: limit, **turns}
    rates = interleave(turns, rounds, title)
    remote = [side for side in sides if side != "bare"]
    firsts = {side: [one["first_s"] for one in seen[side]] for side in remote}
    read = {
        "stored bytes": [float(stored)] * rounds,
        **{side: [float(one["bytes"]) for one in seen[side]] for side in remote},
    }
    return [
        Table(f"{title}: throughput", "rows/s", "link" if limit is not None else "bare", rates),
        Table(f"{title}: first batch", "s", "ours", firsts),
        Table(f"{title}: bytes read in an epoch", "bytes", "stored bytes", read),
    ]


def first_batches(title: str, turn: Turn, sides: list[str], rounds: int) -> Table:
    """The first batch alone, each in a run that ends with it."""
    turns = {side: partial(first_batch, turn, side) for side in sides}
    return Table(f"{title}: first batch", "s", "ours", interleave(turns, rounds, title))


def first_batch(turn: Turn, side: str) -> float:
    """Seconds from opening the data."""
    return float(turn.take(side, stop_after=1)["first_s"])


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--link-mb-per-s", type=float, default=1.0, help="of the setting in which the link binds")
    parser.add_argument("--first-batch", action="store_true", help="measure nothing else, into stream_first_batch")
    options = parse(parser)
    shape = QUICK if options.quick else SHAPE
    sides = ["ours", *options.peers]
    found: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="stream-") as place:
        folder = Path(place)
        stored = write_shards(folder / "store/bench/parquet", shape, options.seed)
        write_tokenizer(folder / "tokenizer", shape.num_rows)
        convert(folder / "store/bench", sides, stored // (shape.files * shape.groups))
        with serving(folder / "store", 0, LATENCY_MS) as endpoint:
            turn = Turn(folder, endpoint, shape, options.seed)
            title = "Nothing binds but the work"
            if options.first_batch:
                found.append(first_batches(title, turn, sides, options.rounds))
            else:
                found += tables(title, turn, ["bare", *sides], options.rounds, stored, None)
        with serving(folder / "store", options.link_mb_per_s, LATENCY_MS) as endpoint:
            turn = Turn(folder, endpoint, shape, options.seed)
            limit = shape.num_rows / (stored / (options.link_mb_per_s * 1e6))
            title = f"A link of {options.link_mb_per_s:g} MB/s"
            if options.first_batch:
                found.append(first_batches(title, turn, sides, options.rounds))
            else:
                found += tables(title, turn, sides, options.rounds, stored, limit)
    settings = {**asdict(shape), "stored_bytes": stored, "latency_ms": LATENCY_MS, "peers": options.peers}
    write_results("stream_first_batch" if options.first_batch else "stream", options, CLAIM, found, settings)


if __name__ == "__main__":
    main()
