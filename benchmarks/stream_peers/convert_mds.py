"""Rows of parquet shards as MosaicML's MDS, before the clock starts."""

from __future__ import annotations

import sys
from pathlib import Path

import no_vision  # noqa: F401  (before streaming)
import pyarrow.parquet as pq
from streaming import MDSWriter

source, target, shard_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with MDSWriter(out=target, columns={"text": "str"}, compression="zstd", size_limit=shard_bytes) as writer:
    for file in sorted(source.glob("*.parquet")):
        for text in pq.read_table(file, columns=["text"]).column("text").to_pylist():
            writer.write({"text": text})
