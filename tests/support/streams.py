"""Streams over tiny files, all ranks of a world in one process. A row's text says which tokens it becomes, so that
rows are known again in the token ids of batches."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import zstandard

from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.recipes.methods.base import IGNORED, Batch, Rejected, RowId, Sample
from ftlaunch.recipes.schema import Data, Model, Recipe, Train, TrainSource

NOWHERE = RowId("", "", 0, 0)


def encode(row, row_format):
    """A row "ID LENGTH" becomes LENGTH + 1 tokens ID, LENGTH of them targets; length 0 is refused."""
    number, length = map(int, row["text"].split())
    if length == 0:
        return Rejected("empty", "length 0")
    return Sample(np.full(length + 1, number, np.int32), np.ones(length + 1, bool), NOWHERE)


def collate(bins, length):
    ids = np.full((len(bins), length), -1, np.int64)
    positions, targets = np.zeros_like(ids), np.full_like(ids, IGNORED)
    for place, samples in enumerate(bins):
        at = 0
        for sample in samples:
            stop = at + len(sample)
            ids[place, at:stop] = sample.input_ids
            positions[place, at:stop] = np.arange(len(sample))
            targets[place, at : stop - 1] = sample.input_ids[1:]
            at = stop
    rows = tuple(tuple(sample.row for sample in samples) for samples in bins)
    return Batch(ids, positions, targets, rows, int((ids >= 0).sum()))


KINDS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "arrow")


class Source(NamedTuple):
    lengths: list[list[int]]
    """[files][rows]"""
    kind: str
    """One of KINDS, or "mixed": every file another."""
    weight: float | None = None
    keys: Mapping = MappingProxyType({})
    """Other keys of the recipe's source."""


def write_file(path, texts, kind):
    """PATH.KIND with a column `text`, in several blocks where the format has blocks."""
    path = path.with_name(f"{path.name}.{kind}")
    table = pa.table({"text": pa.array(texts, pa.string())})
    lines = [json.dumps({"text": text, "pad": "é" * (len(text) * 3 % 17)}) + "\n" for text in texts]
    data = "".join(lines).encode()
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=5)
    elif kind == "arrow":
        pyarrow.feather.write_feather(table, path, chunksize=4)
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}
        path.write_bytes(pack[kind](data))


def write(folder, sources):
    """Files of rows "ID LENGTH", numbered through all sources. Returns the sources and each one's ids."""
    number, recipes, ids = 0, [], []
    for s, source in enumerate(sources):
        place = Path(folder) / f"s{s}"
        place.mkdir()
        first = number
        for f, lengths in enumerate(source.lengths):
            texts = [f"{number + i} {length}" for i, length in enumerate(lengths)]
            number += len(texts)
            write_file(place / str(f), texts, KINDS[f % len(KINDS)] if source.kind == "mixed" else source.kind)
        recipes.append(TrainSource(path=str(place), format="text", weight=source.weight, **source.keys))
        ids.append(set(range(first, number)))
    return tuple(recipes), ids


class Case(NamedTuple):
    """A recipe over tiny files."""

    index: object
    recipe: Recipe
    streams: int
    ids: list[set[int]]
    encode: object = encode

    def open(self, rank=0, world=1, readers=0):
        return open_stream(
            index=self.index, recipe=self.recipe, world_rank=rank, world_size=world, streams=self.streams,
            encode=self.encode, collate=collate, reader_processes=readers,
        )  # fmt: skip


def make_case(folder, sources, *, streams, bins_per_stream=1, train=None, data=None):
    recipes, ids = write(folder, sources)
    names = ["s0", "r1", "q2", "p3"][: len(recipes)]  # sorted, as JSON may have them, they stand the other way round
    index = build_index(recipes, names, block_bytes=64)
    data = {"sequence_length": 16, "pack_buffer": 4, **(data or {})}
    train = {"global_batch_size": streams * bins_per_stream, "seed": 3, **(train or {})}
    recipe = Recipe(name="t", model=Model(path="m"), data=Data(train=recipes, **data), train=Train(**train))
    return Case(index, recipe, streams, ids)


def bins_of(step):
    """Bin number -> the token ids in it, of one rank's step."""
    bins = {}
    for micro in step.micro_batches:
        for row in micro.batch.input_ids:
            tokens = tuple(row[row >= 0].tolist())
            if tokens:
                bins.setdefault(micro.first_bin, []).append(tokens)
    return bins


class Run:
    """All ranks of a world, stepped together."""

    def __init__(self, case, world, states=None):
        self.streams = [case.open(rank, world) for rank in range(world)]
        if states is not None:
            for stream in self.streams:
                stream.restore(json.loads(json.dumps(states, sort_keys=True)))

    def step(self):
        steps = [stream.next_step() for stream in self.streams]
        assert len({len(step.micro_batches) for step in steps}) == 1
        served = sum(step.served_bytes for step in steps)
        bins = sorted(tokens for step in steps for group in bins_of(step).values() for tokens in group)
        return bins, served, steps

    def states(self):
        union = {}
        for stream in self.streams:
            union |= stream.state()
        return union

    def close(self):
        for stream in self.streams:
            stream.close()


def run_to_end(run, limit=10_000):
    steps, served = [], 0
    for _ in range(limit):
        bins, bytes_now, _ = run.step()
        served += bytes_now
        if not bins:
            run.close()
            return steps, served
        steps.append(bins)
    raise AssertionError("the stream does not end")


def rows_in(steps):
    """Tokens of each row that came by."""
    counts = Counter()
    for bins in steps:
        for tokens in bins:
            counts.update(tokens)
    return counts


def sum_counters(run):
    """Counters of all streams, from their states."""
    total = Counter()
    for state in run.states().values():
        for source, counts in state["counters"].items():
            total.update({(source, name): number for name, number in counts.items()})
    return total
