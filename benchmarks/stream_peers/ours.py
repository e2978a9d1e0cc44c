"""ftlaunch's stream over the parquet shards: index, shuffle, tokenise, pack; one rank, readers as the run has them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pyarrow.parquet  # noqa: F401  (what is imported late counts for nobody)
import s3fs  # noqa: F401
import tokenizers  # noqa: F401
from common import Job, Opened, run

from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.stream import open_stream, usual_readers
from ftlaunch.distributed.row_encoder import EncoderSpec, open_encoder
from ftlaunch.recipes.methods.table import build_method
from ftlaunch.recipes.schema import Recipe

ROW_TOKENS = 120
"""Of a row on average: a packed batch holds about as many rows as a peer's."""


def open_data(job: Job, state: Any, path: str = "s3://bench/parquet", row_format: str = "text") -> Opened:
    os.environ.update(AWS_ENDPOINT_URL=job.endpoint, AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
    batch = max(1, round(job.batch_rows * ROW_TOKENS / job.sequence_length))
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "model": {"path": job.tokenizer},
            "method": {"type": "cpt"},
            "data": {
                "sequence_length": job.sequence_length,
                "train": [{"path": path, "format": row_format}],
            },
            "train": {"global_batch_size": batch, "micro_batch_size": batch, "seed": job.seed},
        }
    )
    spec = EncoderSpec(recipe.method, job.tokenizer, None, {}, datetime.now(UTC), None)
    with ThreadPoolExecutor(1) as beside:  # as a run opens its data
        encoder = beside.submit(open_encoder, spec)
        index = build_index(recipe.data.train, ["bench"])
    readers = usual_readers(len(os.sched_getaffinity(0)), on_gpu=False)
    stream = open_stream(
        index=index, recipe=recipe, world_rank=job.rank, world_size=job.ranks, streams=batch, encode=encoder.result(),
        collate=build_method(recipe.method).collate, reader_processes=readers,
    )  # fmt: skip
    if state is not None:
        stream.restore(state)

    def batches() -> Iterator[Sequence[Sequence[int]]]:
        while (step := stream.next_step()).num_bins:
            yield samples(step)

    return Opened(batches(), stream.state)


def samples(step: Any) -> list[Sequence[int]]:
    """The packed samples of a step: positions begin anew with each."""
    found = []
    for micro in step.micro_batches:
        for ids, positions, rows in zip(micro.batch.input_ids, micro.batch.position_ids, micro.batch.rows, strict=True):
            starts = [*(positions == 0).nonzero()[0][: len(rows)].tolist(), len(ids)]
            found += [ids[start:stop] for start, stop in pairwise(starts)][: len(rows)]
    return found


if __name__ == "__main__":
    run(open_data)
