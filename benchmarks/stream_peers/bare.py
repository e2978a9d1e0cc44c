"""The limit where no link binds: the same files on a local disk, read in order and tokenised by a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from common import Job, Opened, batched, run, tokenizer_of


def open_data(job: Job, state: Any) -> Opened:
    tokenizer = tokenizer_of(job)

    def rows() -> Iterator[list[int]]:
        for file in sorted(Path(job.scratch).parent.glob("store/bench/parquet/*.parquet")):
            parquet = pq.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                for text in parquet.read_row_group(group, columns=["text"]).column("text").to_pylist():
                    yield tokenizer.encode(text).ids

    return Opened(batched(rows(), job.batch_rows), lambda: None)


run(open_data)
