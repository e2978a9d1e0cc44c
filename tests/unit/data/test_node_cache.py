"""Large blocks, decoded once on a node."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streams import Source, collate, make_case

from ftlaunch.distributed.data import node_cache, stream
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.node_cache import BlockReader, NodePlace
from ftlaunch.distributed.node_folder import NodeFolder
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import TrainSource

ROWS = [{"text": f"row {number} é", "other": {"a": [number], "b": None}} for number in range(50)]


def parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=25)
    return folder / "a.parquet"


def jsonl_gz(folder: Path) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder / "a.jsonl.gz"


def index_of(path: Path, **options):
    return build_index([TrainSource(path=str(path), format="text", **options)], ["s"])


@pytest.fixture(autouse=True)
def small_blocks_count_as_large(monkeypatch):
    monkeypatch.setattr(node_cache, "LARGE_BYTES", 1)


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    return NodePlace(folder, 10**9)


@pytest.mark.parametrize("write", [parquet, jsonl_gz])
def test_mapped_rows_are_the_rows(tmp_path, place, write):
    index = index_of(write(tmp_path))
    first, second = BlockReader(index, place), BlockReader(index, place)
    for block in range(index.num_blocks):
        plain = index.read_block(block)
        for mapped in (first.read_part(block), second.read_part(block)):
            assert mapped.num_rows == plain.num_rows
            assert [mapped.row(i) for i in range(plain.num_rows)] == [plain.row(i) for i in range(plain.num_rows)]
            assert [mapped.line(i) for i in range(plain.num_rows)] == [plain.line(i) for i in range(plain.num_rows)]
    assert first.read_bytes == index.block_bytes.sum()
    assert second.read_bytes == 0


def test_skip_and_take_hold_for_mapped_blocks(tmp_path, place):
    index = index_of(parquet(tmp_path), skip=3, take=10)
    assert [BlockReader(index, place).read_part(0).row(i)["text"] for i in (0, 9)] == ["row 3 é", "row 12 é"]


def test_a_broken_line_is_named_as_without(tmp_path, place):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n\n{"text": \n'))
    index = index_of(tmp_path / "a.jsonl.gz")
    for _ in range(2):
        with pytest.raises(UserError, match=r"a\.jsonl\.gz, line 3: not valid JSON"):
            BlockReader(index, place).read_part(0).row(1)


def test_many_who_want_a_block_at_once_decode_it_once(tmp_path, place):
    index = index_of(parquet(tmp_path))
    readers = [BlockReader(index, place) for _ in range(8)]
    threads = [threading.Thread(target=reader.read_part, args=(0,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(reader.read_bytes for reader in readers) == index.block_bytes[0]


def test_the_least_recently_used_block_leaves_and_stays_readable_where_it_is_mapped(tmp_path, place):
    index = index_of(parquet(tmp_path))
    held = BlockReader(index, place).read_part(0)
    os.utime(place.folder / "0.arrow", (0, 0))
    size = (place.folder / "0.arrow").stat().st_size
    BlockReader(index, NodePlace(place.folder, size + 100)).read_part(1)
    assert [path.name for path in place.folder.glob("*.arrow")] == ["1.arrow"]
    assert held.row(24)["text"] == "row 24 é"


def test_a_block_without_room_is_read_all_the_same(tmp_path, place):
    index = index_of(parquet(tmp_path))
    reader = BlockReader(index, NodePlace(place.folder, 10))
    assert reader.read_part(0).row(0)["text"] == reader.read_part(0).row(0)["text"] == "row 0 é"
    assert reader.read_bytes == 2 * index.block_bytes[0]
    assert list(place.folder.glob("*.arrow")) == list(place.folder.glob("*.tmp")) == []


def test_numbers_of_blocks_without_tables_are_read_as_ever(tmp_path, place):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    index = index_of(tmp_path / "a.txt")
    reader = BlockReader(index, place)
    rows = [reader.read_part(0).row(i) for i in range(reader.read(0).num_rows)]
    assert rows == [index.read_block(0).row(i) for i in range(len(rows))]
    assert np.array_equal(list(place.folder.iterdir()), [])


def jsonl(folder: Path) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS)
    (folder / "a.jsonl").write_bytes(lines.encode())
    return folder / "a.jsonl"


@pytest.mark.parametrize("write", [parquet, jsonl, jsonl_gz])
def test_a_disk_cache_keeps_every_block_and_names_rows_as_before(tmp_path, monkeypatch, write):
    monkeypatch.setattr(node_cache, "LARGE_BYTES", 2**40)
    index = build_index([TrainSource(path=str(write(tmp_path)), format="text")], ["s"], block_bytes=1000)
    (tmp_path / "cache").mkdir()
    with closing(NodeFolder("run", tmp_path / "cache")) as folder:
        place = NodePlace(folder.path, 10**9, every_block=True)
        first, second = BlockReader(index, place), BlockReader(index, place)
        for block in range(index.num_blocks):
            plain = index.read_block(block)
            for cached in (first.read(block), second.read(block), second.read_part(block)):
                assert [cached.row(i) for i in range(cached.num_rows)] == [plain.row(i) for i in range(plain.num_rows)]
                assert cached.line(1) == plain.line(1)
        assert first.read_bytes == int(index.block_bytes.sum())
        assert second.read_bytes == 0, "another rank of the node fetches nothing again"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_with_a_disk_cache_later_epochs_fetch_nothing(tmp_path, monkeypatch, kind):
    """Two ranks, three epochs, blocks that nobody keeps in memory: each is fetched once, by whoever wants it first."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(stream, "CACHE_BYTES", 1)
    sources = [Source([[3] * 40, [5] * 30], kind)]
    case = make_case(tmp_path, sources, streams=2, data={"disk_cache_gb": 0.01}, train={"num_epochs": 3})

    def read_bytes(key: str | None) -> int:
        ranks = [
            stream.open_stream(
                index=case.index, recipe=case.recipe, world_rank=rank, world_size=2, streams=2, encode=case.encode,
                collate=collate, node_key=key,
            )
            for rank in range(2)
        ]  # fmt: skip
        read, going = 0, True
        while going:
            steps = [rank.next_step() for rank in ranks]
            read += sum(step.read_bytes for step in steps)
            going = any(step.num_bins for step in steps)
        for rank in ranks:
            rank.close()
        return read

    stored = int(case.index.block_bytes.sum())
    assert read_bytes("a run") == stored
    assert read_bytes(None) > 2 * stored
    assert not list((tmp_path / f"ftlaunch-blocks-{os.getuid()}").glob("*.arrow")), "the last rank removes it"
