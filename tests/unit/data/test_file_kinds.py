"""Every kind of file as it lies there, compressed or not; what is wrong with one is said by file and line or row."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlaunch.distributed import storage
from ftlaunch.distributed.data import arrow_ipc, columnar, json_rows, lines, memory, text_files
from ftlaunch.distributed.data.block import BlockAddress
from ftlaunch.distributed.data.build import build_index, require_to_fit
from ftlaunch.distributed.data.cache import BlockCache
from ftlaunch.distributed.data.lanes import RowReader
from ftlaunch.distributed.storage import FileInfo
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Source

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
ROWS = [{"text": f'row {n} ü\n,"quoted"\ttab', "id": str(n)} for n in range(40)]


def index_of(*paths, **options):
    path = tuple(map(str, paths))
    return build_index([Source(path=path, **options)], ["s"])


def rows_of(index):
    blocks = map(index.read_block, range(index.num_blocks))
    return [block.row(number) for block in blocks for number in range(block.num_rows)]


def texts_of(*paths):
    return [row["text"] for row in rows_of(index_of(*paths, format="text"))]


def delimited(rows, delimiter):
    def quoted(value):
        return '"' + value.replace('"', '""') + '"'

    return "".join(delimiter.join(map(quoted, row)) + "\r\n" for row in [list(rows[0]), *map(dict.values, rows)])


BODIES = {
    "jsonl": "\n".join(map(json.dumps, ROWS)),
    "json": json.dumps(ROWS, indent=1),
    "csv": delimited(ROWS, ","),
    "tsv": delimited(ROWS, "\t"),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("bom", [b"", lines.BOM])
def test_rows_of_every_text_format(tmp_path, kind, compression, bom):
    path = tmp_path / f"a.{kind}{compression}"
    path.write_bytes(COMPRESS[compression](bom + BODIES[kind].encode()))
    index = index_of(path)
    assert index.sources[0].format == "text", "found from the columns, in compressed files too"
    assert [row["text"] for row in rows_of(index)] == [row["text"] for row in ROWS]


json_values = st.text(max_size=20) | st.none() | st.lists(st.integers())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), json_values), max_size=9),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
)
def test_json_arrays_and_objects_one_after_the_other(rows, indent, in_array):
    if in_array:
        body = json.dumps(rows, indent=indent, ensure_ascii=False)
    else:
        body = "\n ".join(json.dumps(row, indent=indent, ensure_ascii=False) for row in rows)
    address = BlockAddress(FileInfo("a.json", len(body), ""), 0, 0, len(body), None)
    block = json_rows.parse(body.encode("utf-8", "surrogatepass"), address)
    assert [block.row(number) for number in range(block.num_rows)] == rows
    assert all("{" in body.split("\n")[block.line(number) - 1] for number in range(block.num_rows))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'[{"text": "a"},\n {"text": }]', r"a\.json, line 2: not valid JSON"),
        (b'[{"text": "a"},\n {"text": "b"}', r"a\.json, line 2: not valid JSON \(The array does not end"),
        (b'[{"text": "a"}\n {"text": "b"}]', r"a\.json, line 2: not valid JSON \(Expecting ',' between rows"),
        (b'[{"text": "a"}]\n3', r"a\.json, line 2: not valid JSON \(Something follows"),
        (b'[{"text": "a"},\n["b"]]', r"a\.json, line 2: a row is a JSON object, not a list"),
        (b'[\n{"text": "\xff"}]', r"a\.json, line 2: not valid UTF-8 \(byte 12"),
        (b"[" * 100_000, r"a\.json: not valid JSON \(nested too deeply|a\.json, line 1: not valid JSON"),
    ],
)
def test_broken_json_is_named_by_its_line(tmp_path, body, says):
    (tmp_path / "a.json").write_bytes(body)
    with pytest.raises(UserError, match=says):
        texts_of(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'text,id\n"a",1\n"b",2,3\n', r"a\.csv: CSV parse error: Row #3: Expected 2 columns, got 3"),
        (b"text,id\na,1\nb\xff,2\n", r"a\.csv, line 3: not valid UTF-8"),
        (b"text,text\na,1\n", r"a\.csv, line 1: the header must name every column, each once; it has 'text', 'text'"),
        (b"text,\na,1\n", r"a\.csv, line 1: the header must name every column"),
        (b"a,1\nb,2\n", r"a\.csv: no column 'text'.*Columns there: a, 1"),
    ],
)
def test_broken_csv_is_named_by_its_row(tmp_path, body, says):
    (tmp_path / "a.csv").write_bytes(body)
    with pytest.raises(UserError, match=says):
        texts_of(tmp_path / "a.csv")


def test_values_of_csv_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("text,prompt\n007,\nNA,null\n1.50,true\n")
    assert texts_of(tmp_path / "a.csv") == ["007", "NA", "1.50"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_text_file_is_a_document(tmp_path, compression):
    for name, text in (("a.txt", "one\n\nstill one\n"), ("ö b.md", "# two\r\n")):
        (tmp_path / f"{name}{compression}").write_bytes(COMPRESS[compression](text.encode()))
    assert texts_of(tmp_path) == ["one\n\nstill one\n", "# two\r\n"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_long_text_file_is_read_in_parts_that_end_with_a_line(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 50)
    text = "".join(f"line {number} of ümlauts\n" for number in range(40)) + "no newline at the end"
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESS[compression](text.encode()))
    parts = texts_of(tmp_path)
    assert "".join(parts) == text
    assert len(parts) > 10
    assert all(part.endswith("\n") for part in parts[:-1])


def test_text_that_is_no_utf8_is_named_by_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files.lines, "BLOCK_BYTES", 20)
    (tmp_path / "a.txt").write_bytes(b"a line of text\n" * 5 + b"b\xffd\n")
    with pytest.raises(UserError, match=r"a\.txt, line 6: not valid UTF-8"):
        texts_of(tmp_path / "a.txt")


def test_a_folder_holds_tables_or_json_or_texts(tmp_path):
    for name, body in (("README.md", b"# data"), ("dataset_info.json", b"{}"), ("a.jsonl", b'{"text": "row"}\n')):
        (tmp_path / name).write_bytes(body)
    assert texts_of(tmp_path) == ["row"]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "dataset_info.json").write_text('[{"text": "from json"}]')
    assert texts_of(tmp_path) == ["from json"]
    assert texts_of(tmp_path / "*.md") == ["# data"], "a glob says what is meant"


# arrow


def write_arrow(path, table, writer, chunk=7):
    with pa.OSFile(str(path), "wb") as sink, writer(sink, table.schema) as out:
        out.write_table(table, max_chunksize=chunk)


@pytest.mark.parametrize("writer", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("encoded", [False, True])
def test_an_arrow_block_is_a_record_batch_read_by_one_range(tmp_path, monkeypatch, writer, encoded):
    """Files and streams, plain and with a dictionary before the batches."""
    texts = pa.array([row["text"] for row in ROWS])
    table = pa.table({"text": texts.dictionary_encode() if encoded else texts, "big": ["x" * 5_000] * len(ROWS)})
    write_arrow(tmp_path / "a.arrow", table, writer)
    index = index_of(tmp_path / "a.arrow")
    assert index.num_blocks == 6
    assert rows_of(index) == [{"text": row["text"]} for row in ROWS]
    reads = []
    real = storage.read_file
    monkeypatch.setattr(storage, "read_file", lambda file, *span: reads.append(span) or real(file, *span))
    assert index.read_block(3).row(0) == {"text": ROWS[21]["text"]}
    assert reads == [(index.block_start[3], index.block_start[3] + index.block_bytes[3])]
    if writer is pa.ipc.new_stream:
        assert index.block_rows.tolist() == [7, 7, 7, 7, 7, 5], "seen on the way from message to message"


def test_a_stream_whose_dictionary_changes_is_one_block(tmp_path):
    batches = [pa.record_batch({"text": pa.array(values).dictionary_encode()}) for values in (["a", "b"], ["c", "d"])]
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, batches[0].schema) as out:
        for batch in batches:
            out.write_batch(batch)
    index = index_of(tmp_path / "a.arrow")
    assert index.num_blocks == 1
    assert [row["text"] for row in rows_of(index)] == ["a", "b", "c", "d"]


def test_feather_files_with_compressed_bodies(tmp_path):
    for compression in ("lz4", "zstd", "uncompressed"):
        path = tmp_path / f"{compression}.feather"
        pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), str(path), compression=compression, chunksize=9)
        assert texts_of(path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("writer", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("cut", [3, 60, 400, -1, -40])
def test_an_arrow_file_that_is_cut_off_is_named(tmp_path, writer, cut):
    write_arrow(tmp_path / "a.arrow", pa.Table.from_pylist(ROWS), writer)
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"a\.arrow: not a readable arrow file, or cut off"):
        texts_of(tmp_path / "a.arrow")


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 3_000), st.integers(0, 255), st.booleans())
def test_a_damaged_arrow_file_is_read_or_named(place, value, as_stream):
    """Whatever byte is broken: no crash, no endless loop."""
    sink = pa.BufferOutputStream()
    table = pa.table({"text": ["abc", "d"] * 20})
    with (pa.ipc.new_stream if as_stream else pa.ipc.new_file)(sink, table.schema) as out:
        out.write_table(table, max_chunksize=9)
    data = bytearray(sink.getvalue().to_pybytes())
    data[place % len(data)] = value
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.arrow"
        path.write_bytes(data)
        arrow_ipc._preamble.cache_clear()
        try:
            rows_of(index_of(path))
        except UserError as error:
            assert "a.arrow" in str(error)


def damaged_parquet():
    """Every byte of the pages changed once, and the file cut at every place of its footer. (Of a footer that was
    changed and not cut pyarrow itself may abort: what a column's metadata throws goes through code that lets nothing
    through, and there is nothing to catch; docs/data-formats.md says how the file is found.)"""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["abc", "d"] * 20}), sink, row_group_size=15, compression="none")
    good = sink.getvalue().to_pybytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    yield from (good[:place] + bytes([good[place] ^ 0x81]) + good[place + 1 :] for place in range(4, footer))
    yield from (good[:place] for place in range(footer, len(good), 9))


def test_a_damaged_parquet_file_is_read_or_named(tmp_path):
    path = tmp_path / "a.parquet"
    refused = 0
    for data in damaged_parquet():
        path.write_bytes(data)
        columnar._footer.cache_clear()
        try:
            index = index_of(path, format="text")
            rows = RowReader(index, BlockCache(index.read_block))
            for block in range(index.num_blocks):
                decoded = index.read_block(block)
                for row in range(decoded.num_rows):
                    rows.values(decoded, block, row)
        except UserError as error:
            assert "a.parquet" in str(error)
            refused += 1
    assert refused > 100


def test_text_of_tables_that_is_no_utf8_is_named_by_row_and_column(tmp_path):
    values = pa.array([b"fine", b"b\xffd"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    index = index_of(tmp_path / "a.parquet")
    rows = RowReader(index, BlockCache(index.read_block))
    with pytest.raises(UserError, match=r"a\.parquet, row 1: column text is not valid UTF-8 \(byte 1 of the value"):
        rows.read(0, 1)


# nested columns


def test_nested_columns_come_out_as_json_would_have_them(tmp_path):
    call = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.int64()))])
    message = pa.struct(
        [("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.large_string()), ("at", pa.timestamp("s")),
         ("tool_calls", pa.large_list(call))]
    )  # fmt: skip
    when = datetime.datetime(2024, 5, 1, 12, 30)
    rows = [
        [
            {"role": "user", "content": "2+2?", "at": when, "tool_calls": None},
            {"role": "assistant", "content": None, "at": None,
             "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]},
        ]
    ]  # fmt: skip
    table = pa.table({"messages": pa.array(rows, pa.large_list(message)), "unused": [1]})
    wanted = [
        {"role": "user", "content": "2+2?", "at": "2024-05-01T12:30:00"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]},
    ]
    plain = table.set_column(0, "messages", table["messages"].cast(pa.large_list(_plain(message))))
    pq.write_table(plain, tmp_path / "a.parquet")
    write_arrow(tmp_path / "b.arrow", table, pa.ipc.new_file)
    for name in ("a.parquet", "b.arrow"):
        index = index_of(tmp_path / name)
        assert index.sources[0].format == "chat"
        assert rows_of(index) == [{"messages": wanted}], name
        assert json.dumps(rows_of(index))


def _plain(message):
    """Parquet does not write dictionaries within structs."""
    return pa.struct([field.with_type(pa.string()) if field.name == "role" else field for field in message])


def test_column_names_with_dots_are_read_alone(tmp_path, monkeypatch):
    pq.write_table(pa.table({"a.b": ["x"], "a": ["y"]}), tmp_path / "a.parquet")
    assert rows_of(index_of(tmp_path / "a.parquet", columns={"text": "a.b"})) == [{"a.b": "x"}]


# files that do not belong together


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"text": ["a"]}, {"text": [1]}, r"column 'text' is text in .*a\.parquet and a number in .*b\.parquet"),
        ({"text": ["a"]}, {"body": ["a"]}, r"b\.parquet: no column 'text'.*Columns there: body"),
        ({"text": ["a"]}, {"text": [{"x": 1}]}, r"'text' is text in .* and an object in"),
    ],
)
def test_mixed_schemas_name_both_files_and_the_column(tmp_path, first, second, says):
    pq.write_table(pa.table(first), tmp_path / "a.parquet")
    pq.write_table(pa.table(second), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=says):
        index_of(tmp_path, format="text")


def test_mixed_kinds_of_files_are_compared_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (tmp_path / "b.csv").write_text('messages\n"[]"\n')
    with pytest.raises(UserError, match=r"'messages' is a list in .*a\.jsonl and text in .*b\.csv"):
        index_of(tmp_path)


def test_spellings_of_one_kind_and_nulls_belong_together(tmp_path):
    values = [pa.array(["a"], pa.large_string()), pa.array(["b"]).dictionary_encode(), pa.nulls(1), pa.array(["c"])]
    for number, value in enumerate(values):
        pq.write_table(pa.table({"text": value}), tmp_path / f"{number}.parquet")
    assert texts_of(tmp_path) == ["a", "b", None, "c"]


# memory


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 20_000)


def test_a_row_group_that_does_not_fit_is_refused_with_the_remedy(tmp_path, little_memory):
    table = pa.table({"text": ["0123456789" * 100] * 100, "picture": ["x" * 50_000] * 100})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, use_dictionary=False)
    with pytest.raises(UserError, match=r"a\.parquet: row group 0 takes at least .*smaller row groups"):
        texts_of(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row group 0 takes at least"):
        require_to_fit(index_of(tmp_path / "a.parquet"))
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=5, use_dictionary=False)
    assert len(texts_of(tmp_path / "b.parquet")) == 100, "only the needed column counts"
    require_to_fit(index_of(tmp_path / "b.parquet"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.arrow"])
def test_whole_files_that_do_not_fit_are_refused_before_memory_is_full(tmp_path, little_memory, name):
    rows = [{"text": "0123456789" * 10}] * 500
    path = tmp_path / name
    if name.endswith("arrow"):
        write_arrow(path, pa.Table.from_pylist(rows), pa.ipc.new_file, chunk=500)
    else:
        body = {"json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows)), "csv": delimited(rows, ",")}
        path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](body[name.split(".")[1]].encode()))
    with pytest.raises(UserError, match=rf"{name}: .* takes at least .* of memory, and one read may take 9\.8 KiB"):
        texts_of(path)


def test_a_container_is_asked_for_its_limit(tmp_path):
    for name, text in (("max", "1000000"), ("current", "300000"), ("stat", "anon 5\ninactive_file 100000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._left_in_cgroup(tmp_path) == 800_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_cgroup(tmp_path) == memory._left_in_cgroup(tmp_path / "none") == 2**63


# places


def place_of(index, block, row):
    return RowReader(index, BlockCache(index.read_block)).index.place(block, row, index.read_block(block))


def test_a_row_is_named_by_its_line_or_its_number_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 300)
    (tmp_path / "a.jsonl").write_text("\n" + BODIES["jsonl"])
    (tmp_path / "b.json").write_text(BODIES["json"])
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet", row_group_size=9)
    (tmp_path / "d.csv").write_text(BODIES["csv"])
    write_arrow(tmp_path / "e.arrow", pa.Table.from_pylist(ROWS), pa.ipc.new_stream)
    numbered = {}
    for name in ("a.jsonl", "b.json", "c.parquet", "d.csv", "e.arrow"):
        index = build_index([Source(path=str(tmp_path / name), format="text")], ["s"], block_bytes=300)
        places = [(b, r) for b in range(index.num_blocks) for r in range(index.read_block(b).num_rows)]
        numbered[name] = place_of(index, *places[30]).removeprefix(f"s: {tmp_path}/{name}, ")
    json_line = BODIES["json"].splitlines().index(f'  "text": {json.dumps(ROWS[30]["text"])},')
    assert numbered == {
        "a.jsonl": "line 32",
        "b.json": f"line {json_line}",
        "c.parquet": "row 30",
        "d.csv": "row 30",
        "e.arrow": "row 30",
    }
