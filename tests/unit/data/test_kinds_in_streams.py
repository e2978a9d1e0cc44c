"""Rows of every kind of file, through the stream: each one once an epoch, whatever the blocks are."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ftlaunch.distributed.data import lines
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.recipes.methods.base import IGNORED, Batch, RowId, Sample
from ftlaunch.recipes.schema import Data, Model, Recipe, Train, TrainSource

COUNT, STREAMS = 57, 4


def as_json(numbers):
    return json.dumps([{"text": str(number)} for number in numbers]).encode()


def as_lines(numbers):
    return b"".join(json.dumps({"text": str(number)}).encode() + b"\n" for number in numbers)


def as_csv(numbers):
    return "text\n{}\n".format("\n".join(map(str, numbers))).encode()


def as_arrow(numbers, writer):
    sink = pa.BufferOutputStream()
    table = pa.table({"text": [str(number) for number in numbers]})
    with writer(sink, table.schema) as out:
        out.write_table(table, max_chunksize=4)
    return sink.getvalue().to_pybytes()


def as_parquet(numbers):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [str(number) for number in numbers]}), sink, row_group_size=5)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "json": as_json,
    "json.zst": lambda numbers: zstandard.ZstdCompressor().compress(as_json(numbers)),
    "jsonl": as_lines,
    "jsonl.gz": lambda numbers: gzip.compress(as_lines(numbers)),
    "csv": as_csv,
    "csv.gz": lambda numbers: gzip.compress(as_csv(numbers)),
    "feather": lambda numbers: as_arrow(numbers, pa.ipc.new_file),
    "arrow": lambda numbers: as_arrow(numbers, pa.ipc.new_stream),
    "parquet": as_parquet,
}


def encode(row, _row_format):
    return Sample(np.full(2, int(row["text"]), np.int32), np.ones(2, bool), RowId("", "", 0, 0))


def collate(bins, length):
    ids = np.full((len(bins), length), -1, np.int64)
    for place, samples in enumerate(bins):
        numbers = [int(sample.input_ids[0]) for sample in samples]
        ids[place, : len(numbers)] = numbers
    return Batch(ids, ids, np.full_like(ids, IGNORED), tuple(() for _ in bins), int((ids >= 0).sum()))


def served(folder):
    """How often each number comes by in an epoch, over two ranks."""
    data = Data(train=(TrainSource(path=str(folder), format="text"),), sequence_length=8, pack_buffer=3)
    train = Train(global_batch_size=STREAMS, micro_batch_size=2)
    recipe = Recipe(name="t", model=Model(path="m"), data=data, train=train)
    index = build_index(data.train, ["s"], block_bytes=64)
    found: Counter[int] = Counter()
    for rank in range(2):
        stream = open_stream(
            index=index, recipe=recipe, world_rank=rank, world_size=2, streams=STREAMS, encode=encode, collate=collate,
        )  # fmt: skip
        while (step := stream.next_step()).micro_batches and step.num_bins:
            found.update(int(n) for micro in step.micro_batches for n in micro.batch.input_ids.ravel() if n >= 0)
        stream.close()
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_every_row_comes_once(tmp_path, kind):
    """Two files, one of them small: streams share blocks, and some get none."""
    (tmp_path / f"a.{kind}").write_bytes(WRITERS[kind](range(COUNT - 3)))
    (tmp_path / f"b.{kind}").write_bytes(WRITERS[kind](range(COUNT - 3, COUNT)))
    assert served(tmp_path) == Counter(range(COUNT))


def test_files_of_several_kinds_are_one_source(tmp_path):
    (tmp_path / "a.parquet").write_bytes(as_parquet(range(20)))
    (tmp_path / "b.csv").write_bytes(as_csv(range(20, 40)))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(as_lines(range(40, 57))))
    assert served(tmp_path) == Counter(range(57))


def test_text_files_are_served_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 3)  # a number and its newline start in each part
    (tmp_path / "a.txt").write_text("".join(f"{number}\n" for number in range(10, 60)))
    (tmp_path / "b.txt").write_text("60\n")
    assert served(tmp_path) == Counter(range(10, 61))
