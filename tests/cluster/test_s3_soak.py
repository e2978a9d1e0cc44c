"""Hours of streaming from S3 through a faulty proxy, at world sizes that change on the way: every row accounted for.

`make evidence NAME=soak` streams for SOAK_MINUTES (60) and writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_proxy import FaultyProxy
from servers import moto_process

from ftlaunch.distributed import storage, storage_retry, storage_throttle
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.index import Index
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.recipes.methods.base import RowId, Sample
from ftlaunch.recipes.methods.causal import lay_out
from ftlaunch.recipes.schema import Data, Model, Recipe, Train, TrainSource

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SEED = 11
STREAMS = 4
RATES = {
    "delay": 0.05, "reset": 0.02, "cut": 0.02, "truncate": 0.02, "short": 0.02, "slow_down": 0.01, "error": 0.02,
}  # fmt: skip
PAUSE_S = 0.02
"""Between steps: the soak is about time, and leaves the machine to others."""

MEMORY_GROWTH = 1.1
"""Of the median resident memory of the last quarter to that of the second; the first warms up."""

NOWHERE = RowId("", "", 0, 0)


def encode(row, _):
    """A row is known by its tokens."""
    number, length, _ = row["text"].split(" ", 2)
    return Sample(np.full(int(length), int(number) + 1, np.int32), np.ones(int(length), bool), NOWHERE)


def put_files(client, rows: int, rng: random.Random) -> None:
    """Half of the rows as parquet, half as JSON lines, in eight objects."""
    texts = [f"{number} {rng.randint(2, 60)} {'x' * rng.randint(0, 400)}" for number in range(rows)]
    for part, start in enumerate(range(0, rows, rows // 8)):
        some = texts[start : start + rows // 8]
        if part % 2:
            body = "".join(json.dumps({"text": text}) + "\n" for text in some).encode()
            client.put_object(Bucket="soak", Key=f"data/{part}.jsonl", Body=body)
        else:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table({"text": some}), sink, row_group_size=max(8, rows // 160))
            client.put_object(Bucket="soak", Key=f"data/{part}.parquet", Body=sink.getvalue().to_pybytes())


@dataclass
class Tally:
    """What the soak has seen. `lost` and `repeated` are rows, against one of each in every epoch."""

    epochs: int = 0
    steps: int = 0
    resumes: int = 0
    rows: int = 0
    lost: int = 0
    repeated: int = 0
    rss_bytes: list[int] = field(default_factory=list)

    def add_epoch(self, served: Counter[int], rows: int) -> None:
        gc.collect()
        self.epochs += 1
        self.rows += served.total()
        self.lost += sum(number not in served for number in range(rows))
        self.repeated += sum(count - 1 for count in served.values())
        self.rss_bytes.append(psutil.Process().memory_info().rss)


class World:
    """The ranks of one world size, stepped in turn, as collectives would have them."""

    def __init__(self, index: Index, seed: int, size: int, states: dict[str, dict] | None) -> None:
        data = Data(train=(TrainSource(path="s3://soak/data", format="text"),), sequence_length=128, pack_buffer=16)
        train = Train(global_batch_size=4 * STREAMS, num_epochs=1, seed=seed)
        recipe = Recipe(name="soak", model=Model(path="m"), data=data, train=train)
        self.ranks = [
            open_stream(
                index=index, recipe=recipe, world_rank=rank, world_size=size, streams=STREAMS, encode=encode,
                collate=lay_out,
            )
            for rank in range(size)
        ]  # fmt: skip
        for rank in self.ranks if states else ():
            rank.restore(states)

    def step(self, served: Counter[int]) -> bool:
        """One step of every rank; False at the end. Rows are read back from the batches' token ids."""
        steps = [rank.next_step() for rank in self.ranks]
        for micro in itertools.chain.from_iterable(step.micro_batches for step in steps):
            for place, rows in enumerate(micro.batch.rows):
                starts = np.flatnonzero(micro.batch.position_ids[place] == 0)[: len(rows)]
                served.update((micro.batch.input_ids[place, starts] - 1).tolist())
        return any(step.num_bins for step in steps)

    def close(self) -> dict[str, dict]:
        """Stop; the states of all streams, as a checkpoint keeps them."""
        states = {number: state for rank in self.ranks for number, state in rank.state().items()}
        for rank in self.ranks:
            rank.close()
        return json.loads(json.dumps(states))


def stream_epoch(index: Index, seed: int, rng: random.Random, tally: Tally, rows: int, pause_s: float) -> None:
    """One epoch, resumed at another world size now and then."""
    served: Counter[int] = Counter()
    world = World(index, seed, rng.randint(1, 4), None)
    while world.step(served):
        tally.steps += 1
        time.sleep(pause_s)
        if rng.random() < 0.01:
            world = World(index, seed, rng.randint(1, 4), world.close())
            tally.resumes += 1
    world.close()
    tally.add_epoch(served, rows)


@pytest.fixture
def proxy(tmp_path, monkeypatch):
    """A faulty proxy that `s3://soak` is reached through; its server is a process of its own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(storage_throttle, "_GATES", {})
    with moto_process(tmp_path) as port:
        made = FaultyProxy("127.0.0.1", port, seed=SEED, delay_s=0.5)
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        boto3.client("s3").create_bucket(Bucket="soak")
        yield made
        made.stop()


def soak(proxy: FaultyProxy, seconds: float, rows: int, pause_s: float) -> Tally:
    """Epoch after epoch until the time is over; one at least."""
    rng = random.Random(SEED)
    put_files(boto3.client("s3"), rows, rng)
    proxy.rates = RATES
    index = build_index([TrainSource(path="s3://soak/data", format="text")], ["soak"], block_bytes=2**14)
    tally, started = Tally(), time.monotonic()
    while not tally.epochs or time.monotonic() - started < seconds:
        stream_epoch(index, tally.epochs, rng, tally, rows, pause_s)
    return tally


def check(tally: Tally, proxy: FaultyProxy) -> None:
    assert (tally.lost, tally.repeated) == (0, 0)
    assert set(proxy.counts) >= set(RATES), "every kind of fault came by"
    assert storage.request_counts().total() > storage.request_counts()["ok"]


def test_an_epoch_of_the_soak(proxy, monkeypatch):
    monkeypatch.setattr(storage_retry.RetryPolicy, "wait_s", lambda self, attempt, asked_for_s=0.0: 0.001)
    proxy.delay_s = 0.01
    check(soak(proxy, seconds=0, rows=4_000, pause_s=0.0), proxy)


@pytest.mark.evidence
def test_soak(proxy):
    """Hours; writes benchmarks/results/soak.json."""
    minutes, started = float(os.environ.get("SOAK_MINUTES", "60")), time.monotonic()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    tally = soak(proxy, 60 * minutes, rows=20_000, pause_s=PAUSE_S)
    quarter = max(1, len(tally.rss_bytes) // 4)
    early = statistics.median(tally.rss_bytes[quarter : 2 * quarter] or tally.rss_bytes)
    late = statistics.median(tally.rss_bytes[-quarter:])
    report = {
        "claim": "under injected storage faults and resumes at other world sizes no row is lost or repeated, and "
        "memory is flat",
        "command": f"SOAK_MINUTES={minutes:g} make evidence NAME=soak",
        "commit": commit,
        "python": sys.version.split()[0],
        "seed": SEED,
        "seconds": round(time.monotonic() - started),
        "epochs": tally.epochs,
        "rows_per_epoch": 20_000,
        "rows_served": tally.rows,
        "rows_lost": tally.lost,
        "rows_repeated": tally.repeated,
        "steps": tally.steps,
        "resumes_at_another_world_size": tally.resumes,
        "fault_rates": RATES,
        "answers_by_fault": dict(proxy.counts),
        "requests_by_outcome": dict(storage.request_counts()),
        "memory_mib": {"second_quarter": early // 2**20, "last_quarter": late // 2**20, "growth": late / early},
    }
    (RESULTS / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    check(tally, proxy)
    assert late <= MEMORY_GROWTH * early
