"""What does it cost to go on in the middle of an epoch, and which rows are lost or come twice?

Each side serves an epoch up to a share of its rows, saves its state, and a new process with empty caches goes on from
it. The time to its first batch is held against the same side's cold start; every row has a name in its tokens, so what
was lost or repeated is counted. `skip` is what HF Trainer does without a state: the rows are read and thrown away.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness import Ratio, Rounds, Table, arguments, parse, write_results
from stream import LATENCY_MS, QUICK
from stream_bench import Shape, Turn, convert, serving, write_shards, write_tokenizer

CLAIM = (
    "Resuming takes the same at 10 %, 50 % and 90 % of an epoch, at most 1.3 of a cold start; no row is lost and none "
    "comes twice."
)
SIDES = ["ours", "hf_datasets", "mosaic", "lit"]
SHARES = (0.1, 0.5, 0.9)
WORLD_SIZES = (1, 2)
"""Processes that go on from the state of one."""
SHAPE = Shape(files=8, groups=8, rows=150, words=80)


def serve_until(turn: Turn, side: str, share: float, state: Path) -> list[int]:
    """Names of the rows of an epoch's first part."""
    stop = round(share * turn.shape.num_rows)
    names: list[int] = turn.take(side, stop_after=stop, save=str(state), names=True)["names"]
    return names


def lost_and_repeated(names: list[int], rows: int) -> str:
    """Of an epoch."""
    times = Counter(names)
    return f"{rows - len(times)} lost, {sum(times.values()) - len(times)} repeated"


def rest_of(turn: Turn, side: str, ranks: int, state: Path, served: list[int]) -> str:
    """What becomes of the rows when so many processes go on from a state; a side may refuse to."""
    try:
        rest = turn.take_together(side, ranks, resume=str(state), names=True)
    except SystemExit as failure:
        return f"refused ({str(failure).strip().splitlines()[-1]})"
    names = [name for one in rest for name in one["names"]]
    return lost_and_repeated([*served, *names], turn.shape.num_rows)


def measure(turn: Turn, side: str, rounds: int, folder: Path) -> tuple[Rounds, dict[str, str]]:
    """Seconds to the first batch, cold and resumed, interleaved; rows that went wrong, by share and processes."""
    wrong: dict[str, str] = {}
    for share in SHARES:
        state = folder / f"{side}-{share}.json"
        served = serve_until(turn, side, share, state)
        for ranks in WORLD_SIZES:
            wrong[f"{share:.0%} on {ranks}"] = rest_of(turn, side, ranks, state, served)
    values: Rounds = {"cold": [], **{f"{share:.0%}": [] for share in SHARES}}
    for _ in range(rounds):
        values["cold"].append(turn.take(side, stop_after=1)["first_s"])
        for share in SHARES:
            state = str(folder / f"{side}-{share}.json")
            values[f"{share:.0%}"].append(turn.take(side, resume=state, stop_after=1)["first_s"])
    return values, wrong


def skipping(turn: Turn, rounds: int) -> Rounds:
    """The same of a loop that reads rows and throws them away until it is where it was."""
    rows = turn.shape.num_rows
    values: Rounds = {"cold": [], **{f"{share:.0%}": [] for share in SHARES}}
    for _ in range(rounds):
        values["cold"].append(turn.take("hf_datasets", stop_after=1)["first_s"])
        for share in SHARES:
            values[f"{share:.0%}"].append(turn.take("hf_datasets", stop_after=round(share * rows) + 1)["seconds"])
    return values


def against_datasets(taken: dict[str, Rounds]) -> dict[str, Any]:
    """Our time to the first batch over that of `datasets`' own state, by share."""
    return {
        share: vars(Ratio.of(taken["ours"][share], taken["hf_datasets"][share]))
        for share in taken["ours"]
        if "hf_datasets" in taken
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES)
    options = parse(parser)
    shape = replace(QUICK, rows=200) if options.quick else SHAPE
    found, wrong, taken = [], {}, {}
    with tempfile.TemporaryDirectory(prefix="resume-") as place:
        folder = Path(place)
        stored = write_shards(folder / "store/bench/parquet", shape, options.seed)
        write_tokenizer(folder / "tokenizer", shape.num_rows)
        convert(folder / "store/bench", options.sides, stored // (shape.files * shape.groups))
        with serving(folder / "store", 0, LATENCY_MS) as endpoint:
            turn = Turn(folder, endpoint, shape, options.seed, sequence_length=256 if options.quick else 2048)
            for side in options.sides:
                taken[side], wrong[side] = measure(turn, side, options.rounds, folder)
                note = "Rows of the epoch when so many processes go on: "
                note += "; ".join(f"{at}: {what}" for at, what in wrong[side].items())
                found.append(Table(f"{side}: first batch after resuming", "s", "cold", taken[side], note))
            if "hf_datasets" in options.sides:
                found.append(Table("skip: rows are read again", "s", "cold", skipping(turn, options.rounds)))
    settings = {**asdict(shape), "latency_ms": LATENCY_MS, "rows": shape.num_rows, "wrong": wrong}
    settings["ours / hf_datasets"] = against_datasets(taken)
    write_results("stream_resume", options, CLAIM, found, settings)
    print(json.dumps(wrong, indent=1), {side: statistics.median(values["cold"]) for side, values in taken.items()})


if __name__ == "__main__":
    main()
