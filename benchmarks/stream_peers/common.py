"""What every side of the stream benchmarks does alike; imports nothing of ours, so that peers run in environments of
their own.

A side is a program `SIDE.py JOB.json`: it opens the data, takes batches until the job says stop, and prints one line of
JSON. The clock starts when its packages are imported and stops at the batch, so that nobody is charged for imports.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROW = re.compile(r"r(\d+)")


class Job(NamedTuple):
    """What a side is told. `rows` of the data; `stop_after`: rows to take, None: the epoch; `resume`: file with the
    state to begin from; `save`: file to write the state at the end to; `names`: report the rows that were served;
    `rank` of `ranks`: which of the processes that share the data this one is."""

    endpoint: str
    tokenizer: str
    rows: int
    batch_rows: int
    sequence_length: int
    shuffle_rows: int
    seed: int
    scratch: str
    stop_after: int | None = None
    resume: str | None = None
    save: str | None = None
    names: bool = False
    rank: int = 0
    ranks: int = 1


class Opened(NamedTuple):
    """A side's data: batches of token rows, and its state at any time."""

    batches: Iterator[Sequence[Sequence[int]]]
    state: Callable[[], Any]


def run(opener: Callable[[Job, Any], Opened]) -> None:
    """The main program of a side."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    state = json.loads(Path(job.resume).read_text()) if job.resume else None
    start = time.perf_counter()
    opened = opener(job, state)
    first, rows, tokens, served = 0.0, 0, 0, []
    for batch in opened.batches:
        first = first or time.perf_counter() - start
        rows, tokens = rows + len(batch), tokens + sum(map(len, batch))
        if job.names:
            served.extend(batch)
        if job.stop_after is not None and rows >= job.stop_after:
            break
    seconds = time.perf_counter() - start
    first = first or seconds  # nothing was left: the end of the data came instead of a batch
    if job.save:
        Path(job.save).write_text(json.dumps(opened.state()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    names = [name for ids in served for name in named(job, ids)]
    print(
        json.dumps({"first_s": first, "seconds": seconds, "rows": rows, "tokens": tokens, "mib": peak, "names": names})
    )
    sys.stdout.flush()
    # Some libraries hang in their threads' farewell; everything is said.
    import os

    os._exit(0)


def tokenizer_of(job: Job) -> Any:
    """The tokenizer that all sides use."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{job.tokenizer}/tokenizer.json")


_names: dict[int, int] = {}


def named(job: Job, ids: Sequence[int]) -> list[int]:
    """The rows that a sequence of tokens is made of: each begins with its own word."""
    if not _names:
        vocabulary = tokenizer_of(job).get_vocab()
        _names.update({number: int(match[1]) for word, number in vocabulary.items() if (match := ROW.fullmatch(word))})
    return [_names[token] for token in map(int, ids) if token in _names]


def batched(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` rows."""
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
