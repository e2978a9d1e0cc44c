"""MosaicML Streaming over its own format, into which the rows were converted before; batches by its own loader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import no_vision  # noqa: F401  (before streaming)
from common import Job, Opened, run, tokenizer_of
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory


class Rows(StreamingDataset):
    def __init__(self, job: Job, **settings: Any) -> None:
        super().__init__(**settings)
        self.tokenizer = tokenizer_of(job)

    def __getitem__(self, number: int) -> list[int]:
        ids: list[int] = self.tokenizer.encode(super().__getitem__(number)["text"]).ids
        return ids


def named(rows: list[list[int]]) -> dict[str, list[list[int]]]:
    """A batch as its loader counts one: of a list it takes the first row's length for the number of rows."""
    return {"rows": rows}


def open_data(job: Job, state: Any) -> Opened:
    os.environ.update(S3_ENDPOINT_URL=job.endpoint, AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
    if job.ranks == 1:
        clean_stale_shared_memory()
    data = Rows(
        job, remote="s3://bench/mds", local=f"{job.scratch}/mds", shuffle=True, shuffle_seed=job.seed,
        batch_size=job.batch_rows, num_canonical_nodes=1, predownload=8 * job.batch_rows,
    )  # fmt: skip
    loader = StreamingDataLoader(data, batch_size=job.batch_rows, num_workers=1, collate_fn=named, drop_last=False)
    if state is not None:
        loader.load_state_dict(state)

    def batches() -> Iterator[list[list[int]]]:
        for batch in loader:
            yield batch["rows"]

    return Opened(batches(), loader.state_dict)


if __name__ == "__main__":
    run(open_data)
