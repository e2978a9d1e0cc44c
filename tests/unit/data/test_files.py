"""Files as they lie there: every row once whatever the block size, and mistakes that name file and line."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlaunch.distributed.data import columnar, lines
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.cache import BlockCache
from ftlaunch.distributed.data.changes import find_changes
from ftlaunch.distributed.data.formats import FORMATS
from ftlaunch.distributed.data.index import Index
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.formats import detect_format
from ftlaunch.recipes.schema import Source


def rows_of(index):
    found = []
    for block in range(index.num_blocks):
        read = index.read_block(block)
        found += [read.row(number) for number in range(read.num_rows)]
    return found


def index_of(path, **options):
    block_bytes = options.pop("block_bytes", lines.BLOCK_BYTES)
    return build_index([Source(path=str(path), **options)], ["s"], block_bytes=block_bytes)


texts = st.lists(st.text(max_size=60), min_size=1, max_size=30)
ends = st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"])


@settings(deadline=None)
@given(texts, ends, st.booleans(), st.integers(1, 200), st.integers(1, 40), st.booleans())
def test_every_json_line_is_in_exactly_one_block(values, end, ends_with_newline, block_bytes, margin, ascii_only):
    """Multi-byte characters, blank lines, CRLF, no newline at the end, lines longer than blocks."""
    body = end.join(json.dumps({"text": line}, ensure_ascii=ascii_only) for line in values)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "MARGIN_BYTES", margin)
        path = Path(folder) / "a.jsonl"
        path.write_bytes((body + (end if ends_with_newline else "")).encode("utf-8", "surrogatepass"))
        index = index_of(path, format="text", block_bytes=block_bytes)
        assert [row["text"] for row in rows_of(index)] == values
        assert index.block_bytes.sum() == path.stat().st_size


def compressed(kind, data):
    if kind == "gz":
        return gzip.compress(data[:20]) + gzip.compress(data[20:])  # as `cat a.gz b.gz` makes
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(data[:20]) + compressor.compress(data[20:])


LINES = [{"text": f"row {i} ü"} for i in range(50)]
BODY = "".join(json.dumps(line) + "\n" for line in LINES).encode()


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_lines_in_several_frames(tmp_path, kind):
    (tmp_path / f"a.jsonl.{kind}").write_bytes(compressed(kind, BODY))
    index = index_of(tmp_path)
    assert index.sources[0].format == "text"
    assert index.num_blocks == 1
    assert rows_of(index) == LINES


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files_that_are_cut_off_are_named(tmp_path, kind):
    (tmp_path / f"a.jsonl.{kind}").write_bytes(compressed(kind, BODY)[:-9])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{kind}: the .* data is cut off"):
        rows_of(index_of(tmp_path, format="text"))


@pytest.mark.parametrize("writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams(tmp_path, writer):
    table = pa.Table.from_pylist(LINES)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, writer(sink, table.schema) as out:
        out.write_table(table, max_chunksize=7)
    assert rows_of(index_of(tmp_path)) == LINES
    (tmp_path / "b.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(UserError, match=r"b\.arrow: not a readable arrow file"):
        rows_of(index_of(tmp_path / "b.arrow", format="text"))


def test_parquet_row_groups_nested_columns_and_column_names(tmp_path):
    talks = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(25)]
    talks[3][1]["tool_calls"] = [{"name": "f"}]
    table = pa.table({"other": list(range(25)), "conversation": talks})
    pq.write_table(table, tmp_path / "ünter wegs.parquet", row_group_size=10)
    index = index_of(tmp_path, columns={"messages": "conversation"})
    assert index.sources[0].format == "chat"
    assert index.block_rows.tolist() == [10, 10, 5]
    assert index.num_rows(0) == 25
    assert [row["conversation"] for row in rows_of(index)] == talks, "null fields of other messages are left out"
    assert set(rows_of(index)[0]) == {"conversation"}, "only needed columns are read"
    raw = (tmp_path / "ünter wegs.parquet").read_bytes()
    assert all(0 < start < len(raw) for start in index.block_start)
    assert str(index.row_id(2, 4)) == f"s: {tmp_path}/ünter wegs.parquet, row 24"


def test_an_index_comes_back_from_storage_and_is_verified(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(BODY)
    pq.write_table(pa.Table.from_pylist(LINES), tmp_path / "data" / "b.parquet", row_group_size=20)
    sources = [Source(path=str(tmp_path / "data" / name)) for name in ("a.jsonl", "b.parquet")]
    index = build_index(sources, ["lines", "table"], block_bytes=300)
    index.save(str(tmp_path / "run" / "index"), "train")
    again = Index.load(str(tmp_path / "run" / "index"), "train")
    assert (again.sources, again.files, again.file_kind) == (index.sources, index.files, index.file_kind)
    for name in ("file_source", "block_file", "block_start", "block_bytes", "block_rows"):
        assert np.array_equal(vars(again)[name], vars(index)[name])
    assert rows_of(again) == LINES * 2
    assert rows_of(again.select(1)) == LINES
    assert again.select(1).sources[0].name == "table"
    assert not find_changes(again, sources)
    (tmp_path / "data" / "a.jsonl").write_bytes(BODY + b"{}\n")
    (tmp_path / "data" / "b.parquet").unlink()
    assert re.search(r"(?s)a\.jsonl: grew since.*b\.parquet: not found", str(find_changes(again, sources)))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "x"', r"not valid JSON .*'\{\"text\": \"x\"'"),
        (b'{"text": "\xff\xfe"}', r"not valid UTF-8 \(byte 10 of the line\)"),
        (b"[1, 2]", "a row is a JSON object, not a list"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_broken_line_is_named_by_its_number(tmp_path, line, what, suffix):
    body = BODY + b"\n" + line + b"\n" + BODY
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(body) if suffix == "jsonl.gz" else body)
    with pytest.raises(UserError, match=rf"a\.{suffix}, line 52: {what}"):
        rows_of(index_of(tmp_path, format="text", block_bytes=500))


def test_a_broken_first_line_is_found_when_the_index_is_built(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n\n{"text": \n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not valid JSON"):
        index_of(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-10], lambda data: b"PAR1" + data[4:-8] + b"\0" * 8, lambda _: b"x"]
)
def test_a_parquet_file_without_its_footer_is_named(tmp_path, damage):
    pq.write_table(pa.Table.from_pylist(LINES), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file, or cut off"):
        index_of(tmp_path, format="text")


@pytest.mark.parametrize("columns", [1, 400])
def test_of_a_small_parquet_file_no_byte_is_read_twice(tmp_path, monkeypatch, columns):
    table = pa.table({f"c{number}": ["x" * 40] for number in range(columns)} | {"text": ["y" * 100_000]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False)
    ranges = []

    def read(file, start, stop):
        ranges.append((start, stop))
        return path.read_bytes()[start:stop]

    monkeypatch.setattr(columnar.storage, "read_file", read)
    index = index_of(path, format="text")
    footer = pq.read_metadata(path).serialized_size + 8
    assert sum(stop - start for start, stop in ranges) == max(columnar.SMALL_FOOTER_BYTES, footer)
    assert len(ranges) == (1 if footer <= columnar.SMALL_FOOTER_BYTES else 2)
    ranges.clear()
    assert rows_of(index) == [{"text": "y" * 100_000}]
    assert all(stop <= path.stat().st_size - footer for _, stop in ranges), "the footer is known"


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path):
    pq.write_table(pa.Table.from_pylist(LINES), tmp_path / "a.parquet", compression="snappy")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:120] = b"\xff" * 116
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
        rows_of(index_of(tmp_path))


def test_a_missing_column_says_what_there_is_and_how_to_map(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "b.parquet")
    with pytest.raises(
        UserError, match=r"b\.parquet: no column 'text'.*Columns there: body, id.*columns: \{text: NAME\}"
    ):
        index_of(tmp_path)


def test_formats_are_found_only_when_unambiguous():
    assert detect_format(["messages", "tools", "id"]) == "chat"
    assert detect_format(["prompt", "completion"]) == "prompt_completion"
    assert detect_format(["body"], {"text": "body"}) == "text"
    with pytest.raises(UserError, match=r"here: the columns \(text, messages\) fit chat and text"):
        detect_format(["text", "messages"], where="here")
    with pytest.raises(UserError, match=r"the columns \(a, b\) fit no row format"):
        detect_format(["a", "b"])


def test_nothing_found_says_what_is_near(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.pdf").write_text("x")
    for pattern in ("data/*.parquet", "data/sub/deeper/x.jsonl", "data"):
        with pytest.raises(
            UserError, match=rf"no data files found. Nearest folder: {tmp_path}/data, which holds notes.pdf"
        ):
            index_of(tmp_path / pattern)
    with pytest.raises(UserError, match=r"Nearest folder: \., which holds"):
        index_of("nowhere/*.parquet")
    with pytest.raises(UserError, match=r"notes\.pdf: not a known kind of data file"):
        index_of(tmp_path / "data" / "*.pdf")


def test_empty_files_and_no_rows_are_errors(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.jsonl: the file is empty"):
        index_of(tmp_path, format="text")
    (tmp_path / "a.jsonl").write_bytes(b"\n \n")
    with pytest.raises(UserError, match="no rows"):
        index_of(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no rows at all"):
        index_of(tmp_path)


def test_lists_globs_and_folders(tmp_path):
    for name in ("x 1.jsonl", "ü/y.jsonl", "ü/.z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(BODY)
    several = Source(path=(str(tmp_path / "x*.jsonl"), str(tmp_path / "ü")))
    assert [Path(file.url).name for file in build_index([several], ["s"]).files] == ["x 1.jsonl", "y.jsonl"]


def test_a_block_is_decoded_once_while_anybody_holds_it():
    class Fake:
        num_rows, memory_bytes = 1, 100

    reads = []

    def read(block):
        reads.append(block)
        return Fake()

    cache = BlockCache(read, max_bytes=150, readers=1)  # room for one block
    held = cache.get(0)
    ahead = cache.prefetch([1, 2])
    cache.get(2), cache.get(1)
    assert cache.get(0) is held
    assert sorted(reads) == [0, 1, 2]
    del ahead
    cache.get(3)  # the one reader has let go of its earlier blocks
    cache.get(1)
    assert sorted(reads) == [0, 1, 1, 2, 3], "neither held nor recent: read again"
    cache.close()


def test_a_failed_read_is_raised_and_tried_again():
    answers = iter([UserError("broken"), "fine"])

    class Fine:
        num_rows, memory_bytes = 1, 1

    def read(_):
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return Fine()

    cache = BlockCache(read)
    with pytest.raises(UserError, match="broken"):
        cache.get(0)
    assert cache.get(0).num_rows == 1
    cache.close()


def test_footers_are_read_at_once(tmp_path, monkeypatch):
    """Each waits until four are being read: one after the other they would never be."""
    for number in range(4):
        pq.write_table(pa.table({"text": [f"row {number}"]}), tmp_path / f"{number}.parquet")
    together = threading.Barrier(4)

    def scan(file):
        together.wait(timeout=60)
        return columnar.scan_parquet(file)

    monkeypatch.setitem(FORMATS, "parquet", FORMATS["parquet"]._replace(scan=scan))
    index = build_index([Source(path=str(tmp_path), format="text")], ["s"])
    assert [file.url for file in index.files] == [str(tmp_path / f"{number}.parquet") for number in range(4)]
