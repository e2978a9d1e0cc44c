"""LitData over its own format, into which the rows were converted before; batches by its own loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from common import Job, Opened, run, tokenizer_of
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming import downloader

# It allows no plain HTTP by itself; a store on loopback has nothing else.
downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True


class Rows(StreamingDataset):
    def __init__(self, job: Job, **settings: Any) -> None:
        super().__init__(**settings)
        self.job = job
        self.tokenizer: Any = None

    def __getitem__(self, index: Any) -> list[int]:
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(self.job)
        ids: list[int] = self.tokenizer.encode(super().__getitem__(index)).ids
        return ids


def open_data(job: Job, state: Any) -> Opened:
    if job.ranks > 1:
        torch.distributed.init_process_group("gloo", rank=job.rank, world_size=job.ranks)  # where it looks for its rank
    data = Rows(
        job, input_dir="s3://bench/lit", cache_dir=f"{job.scratch}/lit", shuffle=True, seed=job.seed, drop_last=False,
        storage_options={
            "endpoint_url": job.endpoint, "aws_access_key_id": "x", "aws_secret_access_key": "x",
            "region_name": "us-east-1",
        },
    )  # fmt: skip
    loader = StreamingDataLoader(data, batch_size=job.batch_rows, num_workers=1, collate_fn=list)
    if state is not None:
        loader.load_state_dict(state)

    def batches() -> Iterator[list[list[int]]]:
        yield from loader

    return Opened(batches(), loader.state_dict)


if __name__ == "__main__":
    run(open_data)
