"""The stream's guarantees on random data, recipes and world sizes: a sample in the quick tier, thousands as evidence.

Rows are known again by the token ids of collated batches, read through real files of every kind.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from streams import KINDS, Case, Run, Source, make_case, rows_in, run_to_end, sum_counters

SEED = 20
CASES = 2_000
STATE_BYTES, BYTES_PER_WAITING = 900, 30
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

MIXES = ("whole", "weights", "passes")
ENDS: tuple[dict[str, Any], ...] = ({}, {"repeat": False}, {"num_epochs": 1}, {"num_epochs": 2})
"""Of a weighted source that is not the primary one."""


@dataclass(frozen=True)
class Drawn:
    """One random case."""

    sources: list[Source]
    mix: str
    primary: int
    """Which of weighted sources the epochs are counted on."""
    streams: int
    bins_per_stream: int
    worlds: list[int]
    """Of the run's parts, one after the other."""
    stops: list[int]
    """Steps of each part but the last."""
    data: dict[str, Any]
    train: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn) -> Drawn:
    """Sources of any kind of file, mixed in any way; a run in up to four parts at any world size."""
    mix, count = draw(st.sampled_from(MIXES)), draw(st.integers(1, 3))
    primary = draw(st.integers(0, count - 1))
    row_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=15)
    sources = []
    for number in range(count):
        lengths = draw(st.lists(row_lengths, min_size=1, max_size=5))
        rows = sum(map(len, lengths))
        keys: dict[str, Any] = {}
        if draw(st.booleans()):
            keys["skip"] = draw(st.integers(0, rows - 1))
            keys["take"] = draw(st.integers(1, rows))
        if mix == "passes":
            keys["num_epochs"] = draw(st.integers(1, 3))
        if mix == "weights":
            keys |= {"primary": True} if number == primary else draw(st.sampled_from(ENDS))
        weight = draw(st.integers(1, 9)) / 10 if mix == "weights" else None
        sources.append(Source(lengths, draw(st.sampled_from([*KINDS, "mixed"])), weight, keys))
    parts = draw(st.integers(1, 4))
    packing = draw(st.booleans())
    return Drawn(
        sources,
        mix,
        primary,
        streams=draw(st.integers(1, 6)),
        bins_per_stream=draw(st.integers(1, 3)),
        worlds=[draw(st.integers(1, 8)) for _ in range(parts)],
        stops=[draw(st.integers(0, 5)) for _ in range(parts - 1)],
        data={
            "packing": packing,
            "sequence_length": draw(st.sampled_from([16, 48])),
            "pack_buffer": draw(st.sampled_from([1, 4, 64])),
            "shuffle": draw(st.booleans()),
        },
        train={
            "num_epochs": draw(st.integers(1, 2)),
            "seed": draw(st.integers(0, 99)),
            "micro_batch_size": draw(st.integers(1, 3)),
        },
    )


def check(drawn: Drawn, seen: Counter[str]) -> None:
    """The guarantees of one case. Every step of `Run` also asserts equal numbers of micro-batches on all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        bins = drawn.bins_per_stream
        case = make_case(
            folder, drawn.sources, streams=drawn.streams, bins_per_stream=bins, train=drawn.train, data=drawn.data
        )
        steps, served = run_to_end(alone := Run(case, 1))
        assert served == alone.streams[0].total_bytes
        counted = sum_counters(alone)
        again: list[Any] = []
        served_again, states = 0, None
        for world, stop in zip(drawn.worlds, [*drawn.stops, None], strict=True):
            run = Run(case, world, states)
            if stop is None:
                tail, bytes_now = run_to_end(run)
                again, served_again = again + tail, served_again + bytes_now
                break
            for _ in range(stop):
                now, bytes_now, _ = run.step()
                again, served_again = again + ([now] if now else []), served_again + bytes_now
            states = run.states()
            run.close()
            most = STATE_BYTES + BYTES_PER_WAITING * drawn.data["pack_buffer"]
            assert all(len(json.dumps(state)) <= most for state in states.values())
            seen["restarts"] += 1
        assert again == steps, "the same rows in the same bins of the same steps"
        assert served_again == served
        assert sum_counters(run) == counted
        assert_rows(drawn, steps, case, run)
        assert_shares(drawn, case, run.states())
    seen["cases"] += 1
    seen[f"mix {drawn.mix}"] += 1
    seen["steps"] += len(steps)
    seen["rows"] += len(rows_in(steps))
    seen.update({f"world {world}": 1 for world in drawn.worlds})


def assert_rows(drawn: Drawn, steps: list[Any], case: Case, ended: Run) -> None:
    """Every row that is used comes by as often as its source says, whole; every other one never."""
    length = drawn.data["sequence_length"]
    found, counted = rows_in(steps), sum_counters(ended)
    for number, (source, mine) in enumerate(zip(drawn.sources, case.ids, strict=True)):
        flat = [row for file in source.lengths for row in file]
        skip = source.keys.get("skip", 0)
        used = range(len(flat))[skip : skip + source.keys.get("take", len(flat))]
        least, most = passes(drawn, number, case, ended.states())
        total = 0
        for row, size in enumerate(flat):
            pieces = -(-size // (length - 1))  # of the `size` tokens that are predicted
            times, torn = divmod(found[min(mine) + row], size + pieces)
            assert not torn
            assert least <= times <= most if row in used else times == 0
            total += times
        assert total == counted[case.index.sources[number].name, "rows"]


def passes(drawn: Drawn, number: int, case: Case, states: dict[str, Any]) -> tuple[float, float]:
    """How often each row of a source comes by, at least and at most. A weighted source that is not the primary one is
    left where the primary one ended: each row came once in every pass that all streams went through, and once more at
    most in one that some began; so with one stream no row comes oftener than another by more than once."""
    keys, epochs = drawn.sources[number].keys, drawn.train["num_epochs"]
    if drawn.mix != "weights" or number == drawn.primary:
        exact = keys.get("num_epochs", epochs)
        return exact, exact
    begun = [state["lanes"][case.index.sources[number].name][0] for state in states.values()]
    end = math.inf if keys.get("repeat", True) else epochs
    return min(begun), min(max(begun) + 1, keys.get("num_epochs", end))


def assert_shares(drawn: Drawn, case: Case, states: dict[str, Any]) -> None:
    """Of weighted sources each has served its share of a stream's rows, within one, as long as all were in the mix."""
    if drawn.mix != "weights":
        return
    names = [info.name for info in case.index.sources]
    weights = [round(10 * (source.weight or 0)) for source in drawn.sources]
    lasting = {
        name
        for number, (name, source) in enumerate(zip(names, drawn.sources, strict=True))
        if number != drawn.primary and source.keys.get("repeat", True) and "num_epochs" not in source.keys
    }
    for state in states.values():
        if drawn.streams == 1:  # else a stream may go without the rows of a tiny source for so long that it gives up
            assert lasting <= set(state["draws"]), "what repeats has no end"
        if len(state["draws"]) == len(names) - 1:  # only the primary one has ended
            served = [state["counters"].get(name, {}).get("rows", 0) for name in names]
            for weight, rows in zip(weights, served, strict=True):
                assert abs(rows * sum(weights) - weight * sum(served)) <= sum(weights)


few = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=25)


@few
@given(cases())
def test_a_run_in_parts_equals_one_that_was_never_stopped(drawn):
    check(drawn, Counter())


@pytest.mark.evidence
def test_stream_properties():
    """Thousands of cases; writes benchmarks/results/stream_properties.json."""
    seen: Counter[str] = Counter()

    @seed(SEED)
    @settings(few, max_examples=CASES, database=None)
    @given(cases())
    def every(drawn):
        check(drawn, seen)

    every()
    sizes = [world for world in range(1, 9) if seen[f"world {world}"]]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    report = {
        "claim": "every row comes by as often as the recipe says, in the same bins of the same steps, at any world "
        "size, and however often the run is stopped and goes on at another",
        "command": "make evidence NAME=test_stream_properties",
        "commit": head.stdout.strip(),
        "seed": SEED,
        "cases": seen["cases"],
        "restarts": seen["restarts"],
        "steps": seen["steps"],
        "distinct_rows": seen["rows"],
        "cases_by_mix": {mix: seen[f"mix {mix}"] for mix in MIXES},
        "world_sizes": sizes,
        "file_kinds": list(KINDS),
        "state_bytes_at_most": f"{STATE_BYTES} + {BYTES_PER_WAITING} per waiting sample, for each stream",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "stream_properties.json").write_text(json.dumps(report, indent=1) + "\n")
    assert seen["cases"] >= CASES
    assert sizes == list(range(1, 9))
