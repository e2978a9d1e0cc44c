"""Object storage over the real protocol (moto speaks S3 over HTTP) and plain HTTP with ranges."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import threading
import zlib
from pathlib import Path
from typing import ClassVar

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_proxy import FaultyProxy
from moto.server import ThreadedMotoServer

from ftlaunch.distributed import storage
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.changes import find_changes
from ftlaunch.distributed.data.index import Index
from ftlaunch.distributed.storage import LineLog, RetryPolicy
from ftlaunch.recipes.errors import InfrastructureError, UserError
from ftlaunch.recipes.schema import Source

LINES = [{"text": f"row {i} ü"} for i in range(200)]
BODY = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()


def parquet_bytes():
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(LINES), buffer, row_group_size=30)
    return buffer.getvalue()


def rows_of(index):
    blocks = [index.read_block(block) for block in range(index.num_blocks)]
    return [block.row(number) for block in blocks for number in range(block.num_rows)]


@pytest.fixture(scope="module")
def s3():
    """URL of a bucket on a fresh S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="acme")
        yield "s3://acme"
        server.stop()


def test_s3_reading_writing_listing(s3):
    url = storage.join(s3, "wörk space", "a b.bin")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_range(url, 3, 7) == b"3456"
    assert storage.read_bytes(url) == b"0123456789"
    first = storage.info(url)
    assert (first.url, first.size) == (url, 10)
    storage.write_bytes(url, b"9876543210")
    assert storage.info(url).etag != first.etag
    assert storage.list_names(storage.join(s3, "wörk space")) == ["a b.bin"]
    assert [info.url for info in storage.list_files(storage.join(s3, "wörk space/*.bin"))] == [url]
    assert storage.list_files(storage.join(s3, "wörk space"))[0] == storage.info(url)
    storage.delete_tree(storage.join(s3, "wörk space"))
    storage.delete_tree(storage.join(s3, "wörk space"))
    assert not storage.exists(url)
    storage.check_writable(storage.join(s3, "runs"))


def test_s3_exclusive_create(s3):
    url = storage.join(s3, "commits", "step-1.json")
    assert storage.create_exclusive(url, b"mine")
    assert not storage.create_exclusive(url, b"theirs")
    assert storage.read_bytes(url) == b"mine"


def test_s3_streams_appear_whole_or_not_at_all(s3):
    url = storage.join(s3, "big.bin")
    data = bytes(range(256)) * (storage.WRITE_BLOCK_BYTES // 200)
    with storage.open_write(url) as file:
        file.write(data)
    assert storage.read_bytes(url) == data
    for size in (10, storage.WRITE_BLOCK_BYTES * 2):
        with pytest.raises(RuntimeError), storage.open_write(storage.join(s3, "torn.bin")) as file:
            file.write(b"x" * size)
            raise RuntimeError
    assert not storage.exists(storage.join(s3, "torn.bin"))
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket="acme")


def test_s3_parts_of_a_file_come_from_anybody_in_any_order(s3):
    url = storage.join(s3, "pärts", "big file.bin")
    data = os.urandom(2 * storage.part_bytes(0) + 1000)
    parts = [
        bytearray(data[start : start + storage.part_bytes(0)]) for start in range(0, len(data), storage.part_bytes(0))
    ]
    clients = [storage.PartUploads(s3) for _ in parts]
    upload = clients[0].begin(url)
    marks = {}
    for number in (3, 1, 2):
        crc32 = zlib.crc32(parts[number - 1])
        marks[number] = clients[number - 1].send(url, upload, number, parts[number - 1], crc32)
        assert not storage.exists(url)
    clients[0].finish(url, upload, [marks[1], marks[2], marks[3]], len(data))
    assert storage.read_bytes(url) == data
    left = clients[1].begin(url)
    clients[2].abort(url, left)
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket="acme")


def test_an_upload_whose_last_answer_was_lost_is_finished(s3, monkeypatch):
    url = storage.join(s3, "finished.bin")
    storage.write_bytes(url, b"0123456789")
    client = storage.PartUploads(s3)

    def gone(*_, **__):
        raise UserError("there is no such upload")

    monkeypatch.setattr(client, "_call", gone)
    client.finish(url, "upload", [storage.PartMark("etag", "checksum")], 10)
    with pytest.raises(UserError, match="no such upload"):  # what is there is something else
        client.finish(url, "upload", [storage.PartMark("etag", "checksum")], 11)


def test_s3_parts_are_few_enough():
    assert storage.part_bytes(2**20) == storage.part_bytes(2**35) == 6 * 2**20
    for size in (2**36, 5 * 10**12 - 3):
        assert storage.part_bytes(size) % 8 == 0
        assert 9_000 < -(-size // storage.part_bytes(size)) <= 10_000
    assert [storage.takes_parts(url) for url in ("s3://b/k", "s3a://b/k", "gs://b/k", "/tmp", "memory://b")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_s3_logs_continue(s3):
    url = storage.join(s3, "metrics.jsonl")
    for step in (1, 2):
        log = LineLog(url)
        log.append({"step": step})
        log.close()
    assert storage.read_bytes(url) == b'{"step":1}\n{"step":2}\n'


def test_s3_data_is_read_as_it_lies_there(s3):
    storage.write_bytes(storage.join(s3, "data/a.jsonl"), BODY)
    storage.write_bytes(storage.join(s3, "data/b c.parquet"), parquet_bytes())
    sources = [Source(path=storage.join(s3, "data"))]
    index = build_index(sources, ["s"], block_bytes=777)
    assert rows_of(index) == LINES * 2
    index.save(storage.join(s3, "run/index"), "train")
    again = Index.load(storage.join(s3, "run/index"), "train")
    assert not find_changes(again, sources)
    storage.write_bytes(storage.join(s3, "data/a.jsonl"), BODY[:-1] + b" ")
    assert "s3://acme/data/a.jsonl: changed" in str(find_changes(again, sources))


def test_s3_mistakes_name_the_place(s3):
    with pytest.raises(UserError, match="s3://nowhere-at-all"):
        storage.check_writable("s3://nowhere-at-all/runs")
    with pytest.raises(UserError, match=r"s3://acme/none\.bin: not found"):
        storage.read_bytes("s3://acme/none.bin")
    with pytest.raises(UserError, match=r"Nearest folder: s3://acme"):
        build_index([Source(path="s3://acme/none/*.parquet")], ["s"])
    with pytest.raises(UserError, match="the bucket neither"):
        build_index([Source(path="s3://nowhere-at-all/a/*.parquet")], ["s"])


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files with ranges; can be told to fail the next requests."""

    failures: ClassVar[list[int]] = []
    ignores_ranges = False

    def do_GET(self):
        if self.failures:
            self.send_error(self.failures.pop(0))
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and not self.ignores_ranges:
            part = data[int(asked[1]) : int(asked[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
            data = part
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path):
    """URL of a web server over a folder, and the folder."""
    handler = type("Handler", (RangeHandler,), {"failures": [], "ignores_ranges": False})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path, handler
    server.shutdown()


def test_http_files_are_read_in_ranges(web):
    url, folder, _ = web
    (folder / "a.jsonl").write_bytes(BODY)
    (folder / "b.parquet").write_bytes(parquet_bytes())
    index = build_index([Source(path=(f"{url}/a.jsonl", f"{url}/b.parquet"))], ["s"], block_bytes=777)
    assert rows_of(index) == LINES * 2
    with pytest.raises(UserError, match=r"none\.jsonl: no data files found"):
        build_index([Source(path=f"{url}/none.jsonl")], ["s"])


def test_http_trouble_that_passes_is_retried_and_refusals_are_not(web):
    url, folder, handler = web
    (folder / "a.bin").write_bytes(b"0123456789")
    waits: list[float] = []
    policy = RetryPolicy(attempts=3, sleep=waits.append)
    handler.failures += [503, 500]
    assert storage.read_range(f"{url}/a.bin", 2, 4, policy) == b"23"
    assert len(waits) == 2
    handler.failures += [503, 503, 503]
    with pytest.raises(InfrastructureError, match="503"):
        storage.read_range(f"{url}/a.bin", 2, 4, policy)
    handler.failures += [403]
    with pytest.raises(UserError, match="access denied"):
        storage.read_range(f"{url}/a.bin", 2, 4, policy)
    assert handler.failures == []


def test_a_server_without_ranges_is_refused(web):
    url, folder, handler = web
    (folder / "a.bin").write_bytes(b"0123456789")
    handler.ignores_ranges = True
    with pytest.raises(UserError, match="ignores ranges"):
        storage.read_range(f"{url}/a.bin", 2, 4)


def test_a_folder_of_an_object_store_is_listed_in_one_request(s3):
    """Before the first batch every round trip counts."""
    for name in ("one/a.jsonl", "one/deep/b.jsonl", "one/c.txt", "one/_hidden.jsonl", "one.jsonl"):
        storage.write_bytes(storage.join(s3, name), b"x\n")
    proxy = FaultyProxy(*os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":"))
    options = storage.options_text({"endpoint_url": proxy.url})
    try:
        found = storage.list_files(storage.join(s3, "one"), [".jsonl"], options=options)
        assert [file.url for file in found] == [f"{s3}/one/a.jsonl", f"{s3}/one/deep/b.jsonl"]
        assert len(proxy.heads) == 1
        (alone,) = storage.list_files(storage.join(s3, "one.jsonl"), options=options)
        assert alone == storage.info(storage.join(s3, "one.jsonl"), options=options)
        assert storage.list_files(storage.join(s3, "nothing"), options=options) == []
        assert storage.list_files("s3://no-such-bucket/x", options=options) == []
    finally:
        proxy.stop()
