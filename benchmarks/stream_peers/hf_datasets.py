"""HF `datasets`, streaming the parquet shards, shuffled through its buffer, tokenised by `map`."""

from __future__ import annotations

from typing import Any

from common import Job, Opened, batched, run, tokenizer_of
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node


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
    if job.ranks > 1:
        data = split_dataset_by_node(data, job.rank, job.ranks)
    data = data.shuffle(seed=job.seed, buffer_size=job.shuffle_rows)
    data = data.map(tokenise, batched=True, batch_size=job.batch_rows, remove_columns=["text"])
    if state is not None:
        data.load_state_dict(state)

    # Rows are taken from `data` itself: of what `data.batch` gives, the state of this object knows nothing.
    return Opened(batched((row["input_ids"] for row in data), job.batch_rows), data.state_dict)


run(open_data)
