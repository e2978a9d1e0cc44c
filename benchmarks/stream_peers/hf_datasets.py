"""HF `datasets`, streaming the parquet shards, shuffled through its buffer, tokenised by `map`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common import Job, Opened, run, tokenizer_of
from datasets import load_dataset


def open_data(job: Job, state: Any) -> Opened:
    tokenizer = tokenizer_of(job)

    def tokenise(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [encoding.ids for encoding in tokenizer.encode_batch(rows["text"])]}

    data = load_dataset(
        "parquet",
        data_files="s3://bench/parquet/*.parquet",
        split="train",
        streaming=True,
        columns=["text"],
        storage_options={"key": "x", "secret": "x", "client_kwargs": {"endpoint_url": job.endpoint}},
    )
    data = data.shuffle(seed=job.seed, buffer_size=job.shuffle_rows)
    data = data.map(tokenise, batched=True, batch_size=job.batch_rows, remove_columns=["text"])
    if state is not None:
        data.load_state_dict(state)

    def batches() -> Iterator[list[list[int]]]:
        for batch in data.batch(job.batch_rows):
            yield batch["input_ids"]

    return Opened(batches(), data.state_dict)


run(open_data)
