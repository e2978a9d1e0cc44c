"""Ray Data: parquet blocks in shuffled file order, a local shuffle buffer, tokenised by tasks. It has no state."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs
import ray
from common import Job, Opened, run, tokenizer_of

ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
logging.getLogger("ray.data").setLevel(logging.ERROR)


def open_data(job: Job, state: Any) -> Opened:
    def tokenise(table: pa.Table) -> pa.Table:
        encodings = tokenizer_of(job).encode_batch(table.column("text").to_pylist())
        return pa.table({"input_ids": [encoding.ids for encoding in encodings]})

    store = pyarrow.fs.S3FileSystem(
        endpoint_override=job.endpoint, access_key="x", secret_key="x", region="us-east-1", scheme="http"
    )
    data = ray.data.read_parquet("bench/parquet", filesystem=store, columns=["text"], shuffle="files")
    data = data.map_batches(tokenise, batch_format="pyarrow", batch_size=None)

    def batches() -> Iterator[list[list[int]]]:
        taken = data.iter_batches(
            batch_size=job.batch_rows, batch_format="pyarrow", local_shuffle_buffer_size=job.shuffle_rows,
            local_shuffle_seed=job.seed,
        )  # fmt: skip
        for table in taken:
            yield table.column("input_ids").to_pylist()

    return Opened(batches(), lambda: None)


run(open_data)
