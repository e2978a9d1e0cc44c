"""`skip` and `take`: the same rows whatever the files are, exact at any world size."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.distributed.data.block import ALL_ROWS, UNKNOWN_ROWS
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.index import Index
from ftlaunch.distributed.data.selection import COUNTED_AT_ONCE, rows_wanted
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import TrainSource

blocks = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=80)


@given(blocks, st.integers(0, 120), st.none() | st.integers(1, 120))
def test_the_range_is_exact_and_no_more_is_read_than_needed(sizes, skip, take):
    true = np.array([rows for rows, _ in sizes])
    read = []

    def count(places):
        read.extend(places)
        return true[places]

    wanted = rows_wanted(np.where([known for _, known in sizes], true, UNKNOWN_ROWS), count, skip, take)
    rows = [(block, row) for block, size in enumerate(true) for row in range(size)]
    served = []
    for block, (first, number) in enumerate(zip(wanted.skip, wanted.take, strict=True)):
        stop = true[block] if number == ALL_ROWS else first + number
        served += [(block, row) for row in range(first, stop)]
    stop = len(rows) if take is None else skip + take
    assert served == rows[skip:stop]
    needed = skip if take is None else stop
    end = next((b for b in range(len(true)) if true[: b + 1].sum() >= needed), len(true))
    assert all(block < end + COUNTED_AT_ONCE for block in read)
    assert needed or not read


def write(folder, kind):
    """30 rows in two files of several blocks."""
    texts = [str(number) * (1 + number % 5) for number in range(30)]
    for name, part in (("a", texts[:17]), ("b", texts[17:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        if kind == "parquet":
            pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet", row_group_size=4)
        elif kind == "jsonl":
            (folder / f"{name}.jsonl").write_text(lines)
        else:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return texts


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize(("skip", "take"), [(0, 5), (3, None), (15, 10), (29, 9)])
def test_files_give_the_rows_that_were_asked_for(tmp_path, kind, skip, take):
    data = tmp_path / "data"
    data.mkdir()
    texts = write(data, kind)
    sources = [TrainSource(path=str(data), format="text", skip=skip, take=take)]
    build_index(sources, ["a"], block_bytes=64).save(str(tmp_path), "index")
    index = Index.load(str(tmp_path), "index").select(0)
    read, ids = [], []
    for block in index.used_blocks.tolist():
        decoded = index.read_block(block)
        read += [decoded.row(number)["text"] for number in range(decoded.num_rows)]
        ids += [index.row_id(block, number) for number in range(decoded.num_rows)]
    assert read == (texts[skip:] if take is None else texts[skip : skip + take])
    assert len(set(ids)) == len(ids)
    whole = build_index([TrainSource(path=str(data), format="text")], ["a"], block_bytes=64)
    true = [(row, whole.row_id(b, row)) for b in range(whole.num_blocks) for row in range(whole.read_block(b).num_rows)]
    assert [one[:4] for one in ids] == [one[:4] for _, one in true][skip : skip + len(ids)], "a row keeps its name"
    assert index.num_rows(0) == len(read)


def test_part_of_a_block_counts_for_part_of_its_bytes(tmp_path):
    pq.write_table(pa.table({"text": ["x" * 1000] * 1000}), tmp_path / "a.parquet", row_group_size=1000)
    whole = build_index([TrainSource(path=str(tmp_path), format="text")], ["a"])
    part = build_index([TrainSource(path=str(tmp_path), format="text", take=100)], ["a"])
    assert part.order_bytes[0] == whole.order_bytes[0] // 10


def test_nothing_left_is_an_error(tmp_path):
    write(tmp_path, "jsonl")
    with pytest.raises(UserError, match="source a: skip 30 leaves nothing of its 30 rows"):
        build_index([TrainSource(path=str(tmp_path), format="text", skip=30)], ["a"])
