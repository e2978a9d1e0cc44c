"""Rows of parquet shards in LitData's format, before the clock starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
from litdata import optimize


def texts(file: str):  # type: ignore[no-untyped-def]
    """The rows of a file."""
    yield from pq.read_table(file, columns=["text"]).column("text").to_pylist()


if __name__ == "__main__":
    source, target, chunk_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    files = [str(file) for file in sorted(source.glob("*.parquet"))]
    optimize(
        fn=texts, inputs=files, output_dir=target, chunk_bytes=chunk_bytes, compression="zstd", num_workers=1,
    )  # fmt: skip
