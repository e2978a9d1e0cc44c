"""A manifest of 100,000 files and 10^12 rows: what it takes in memory, and that every place in it can be found."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from ftlaunch.distributed.data.block import ALL_ROWS
from ftlaunch.distributed.data.index import Index
from ftlaunch.distributed.data.lane_plan import plan_lanes
from ftlaunch.distributed.data.order import slice_rows
from ftlaunch.distributed.data.sources import SourceInfo
from ftlaunch.distributed.storage import FileInfo
from ftlaunch.recipes.schema import Data, Train, TrainSource

FILES, BLOCKS_EACH, ROWS_EACH = 100_000, 10, 1_000_000
STREAMS = 16


def synthetic_index() -> Index:
    """Files of ten row groups of a million rows each."""
    blocks = FILES * BLOCKS_EACH
    files = tuple(
        FileInfo(f"s3://acme/corpus/year=2024/part-{number:06d}.parquet", 2**30 + number, f'"{number:032x}-64"')
        for number in range(FILES)
    )
    return Index(
        (SourceInfo("corpus", "text", {}),),
        files,
        ("parquet",) * FILES,
        np.zeros(FILES, np.int64),
        np.repeat(np.arange(FILES), BLOCKS_EACH),
        np.tile(np.arange(BLOCKS_EACH) * 2**27 + 4, FILES),
        2**27 + np.arange(blocks) % 1000,
        np.full(blocks, ROWS_EACH),
        np.zeros(blocks, np.int64),
        np.full(blocks, ALL_ROWS),
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    synthetic_index().save(str(folder), "train")
    return folder


def test_a_large_index_is_megabytes_on_disk_and_in_memory(stored):
    assert sum(path.stat().st_size for path in stored.iterdir()) < 10 * 2**20
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    index = Index.load(str(stored), "train")
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.num_rows(0) == 10**12
    assert now + pa.total_allocated_bytes() - before < 144 * 2**20, "48 MB of blocks, and 100,000 files"
    assert peak < 144 * 2**20


def test_every_place_in_a_large_index_can_be_found(stored):
    """Segments cover all bytes; a row deep in an epoch is named by file and number without anything being counted."""
    index = Index.load(str(stored), "train")
    data = Data(train=(TrainSource(path="s3://acme/corpus", format="text"),))
    (lane,) = plan_lanes(index, data, Train(num_epochs=3), STREAMS)
    segments = [lane.order.segment(stream, 1) for stream in range(STREAMS)]
    assert sum(segment.nbytes for segment in segments) == int(index.block_bytes.sum())
    last = segments[5][len(segments[5]) * 9 // 10]
    block = int(lane.block_ids[last.block])
    rows = slice_rows(last, lane.order.block_bytes(last.block), ROWS_EACH)
    name = index.row_id(block, rows[-1])
    assert name.file == f"s3://acme/corpus/year=2024/part-{block // BLOCKS_EACH:06d}.parquet"
    assert name.file_row == block % BLOCKS_EACH * ROWS_EACH + ROWS_EACH - 1
    shuffled = lane.order.window_order(5, 1, 0, 10_000)
    assert np.array_equal(np.sort(shuffled), np.arange(10_000))
