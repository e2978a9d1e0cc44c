"""How fast do rows stream from object storage, how soon does the first batch come, how much is read?

All sides read the same rows from an S3 server on loopback whose link and round trip are set, shuffle, tokenise with
the same tokenizer and hand out batches; ftlaunch packs besides. Peers that need a format of their own got the rows
converted before, and `ours_prepared` reads shards of `ftlaunch prepare`, which are as large as they are. `bare` reads
the files in order from a local disk in a plain loop: the limit where no link binds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import Table, arguments, interleave, parse, write_results
from stream_bench import Shape, Turn, convert, prepare_shards, serving, write_shards, write_tokenizer

CLAIM = (
    "Rows a second: at least 0.95 of the link or of the bare loop, whichever binds, and at least the best peer's. "
    "Bytes read / bytes needed: at most 1.05. The first batch: ahead of every peer. Shards of tokens that `ftlaunch "
    "prepare` made: at least 0.95 of the link, too, in an epoch of 50 s (`--prepared`); in one of 13 s the last "
    "second, in which nothing is left to fetch, counts for more."
)
PREPARED = "ours_prepared"
PEERS = ["hf_datasets", "mosaic", "lit", "ray_data"]
SHAPE = Shape(files=24, groups=8, rows=250, words=100)
"""An epoch long enough that the start, which has a table of its own, does not decide about throughput."""
LONGER = 4
"""Times as many files where prepared shards are measured: their row groups are 8 times as large, and what the streams
still hold when the last byte has come takes a second, however long the epoch was."""
QUICK = Shape(files=2, groups=2, rows=50, words=40)
LATENCY_MS = 20.0


def first_and_rate(turn: Turn, side: str, seen: dict[str, list[dict[str, Any]]]) -> float:
    """Rows a second of an epoch; what else was measured is kept in `seen`."""
    measured = turn.take(side)
    if measured["rows"] != turn.shape.num_rows:
        raise SystemExit(f"{side} served {measured['rows']} of {turn.shape.num_rows} rows")
    seen.setdefault(side, []).append(measured)
    return float(measured["rows"] / measured["seconds"])


def tables(title: str, turn: Turn, sides: list[str], rounds: int, stored: int, link_mb_per_s: float) -> list[Table]:
    """Throughput, first batch and bytes of one setting. The link is the base, or `bare` where there is none."""
    seen: dict[str, list[dict[str, Any]]] = {}
    base, shown = ("link", sides) if link_mb_per_s else ("bare", ["bare", *sides])
    turns: dict[str, Callable[[], float]] = {side: partial(first_and_rate, turn, side, seen) for side in shown}
    if link_mb_per_s:
        limit = turn.shape.num_rows / (stored / (link_mb_per_s * 1e6))
        turns = {"link": lambda: limit, **turns}
    rates = interleave(turns, rounds, title)
    firsts = {side: [one["first_s"] for one in seen[side]] for side in sides}
    read = {
        "stored bytes": [float(stored)] * rounds,
        **{side: [float(one["bytes"]) for one in seen[side]] for side in sides},
    }
    of_firsts = [Table(f"{title}: first batch", "s", "ours", firsts)] if "ours" in sides else []
    return [
        Table(f"{title}: throughput", "rows/s", base, rates),
        *of_firsts,
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
    parser.add_argument("--prepared", action="store_true", help="measure ftlaunch alone, into stream_prepared")
    options = parse(parser)
    name = "stream_first_batch" if options.first_batch else "stream_prepared" if options.prepared else "stream"
    whole = replace(SHAPE, files=LONGER * SHAPE.files) if options.prepared else SHAPE
    shape = QUICK if options.quick else whole
    peers = [] if options.prepared else options.peers
    sides = ["ours", *peers]
    found: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="stream-") as place:
        folder = Path(place)
        stored = write_shards(folder / "store/bench/parquet", shape, options.seed)
        tokenizer = write_tokenizer(folder / "tokenizer", shape.num_rows)
        convert(folder / "store/bench", sides, stored // (shape.files * shape.groups))
        tokens = prepare_shards(folder / "store/bench", tokenizer, Turn.sequence_length)
        settings = (
            ("Nothing binds but the work", 0.0),
            (f"A link of {options.link_mb_per_s:g} MB/s", options.link_mb_per_s),
        )
        for title, link_mb_per_s in settings:
            with serving(folder / "store", link_mb_per_s, LATENCY_MS) as endpoint:
                turn = Turn(folder, endpoint, shape, options.seed)
                if options.first_batch:
                    found.append(first_batches(title, turn, [*sides, PREPARED], options.rounds))
                    continue
                found += tables(title, turn, sides, options.rounds, stored, link_mb_per_s)
                ahead = f"{title}, tokens prepared ahead"
                found += tables(ahead, turn, [PREPARED], options.rounds, tokens, link_mb_per_s)
    about = {
        **asdict(shape),
        "stored_bytes": stored,
        "prepared_bytes": tokens,
        "latency_ms": LATENCY_MS,
        "peers": peers,
    }
    write_results(name, options, CLAIM, found, about)


if __name__ == "__main__":
    main()
