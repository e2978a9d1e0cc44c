"""Reads from S3 (moto) and over HTTP through a proxy that delays, resets, cuts, truncates and refuses."""

from __future__ import annotations

import json
import re
import threading
import zlib
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from faulty_proxy import PASSING, REFUSALS, FaultyProxy
from servers import moto_process
from tiny import recipe_for, text_rows, write_parquet, write_recipe

from ftlaunch.distributed import entry, storage, storage_retry, storage_throttle
from ftlaunch.distributed.data import feed, lanes, order, stream
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.changes import find_changes
from ftlaunch.distributed.data.index import Index
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.launcher import cli
from ftlaunch.launcher.plan_data import index_source
from ftlaunch.recipes.errors import InfrastructureError, UserError
from ftlaunch.recipes.methods.base import RowId, Sample
from ftlaunch.recipes.methods.causal import lay_out
from ftlaunch.recipes.schema import Data, Model, Recipe, Source, Train, TrainSource

ROWS = 240
NOWHERE = RowId("", "", 0, 0)
ENDPOINT = "AWS_ENDPOINT_URL"


def encode(row, _):
    number, length = map(int, row["text"].split())
    return Sample(np.full(length, number + 1, np.int32), np.ones(length, bool), NOWHERE)


def write_files(folder: Path) -> None:
    texts = [f"{number} {2 + number % 7}" for number in range(ROWS)]
    (folder / "data").mkdir()
    pq.write_table(pa.table({"text": texts[:120]}), folder / "data/a ü.parquet", row_group_size=8)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[120:])
    (folder / "data/b.jsonl").write_text(lines)


class WebHandler(SimpleHTTPRequestHandler):
    """Ranges and ETags, as web servers give them; `etag` makes one of the content."""

    etag = staticmethod(lambda data: f'"{hash(data):x}"')

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", self.etag(data))
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("faults")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def store(files, tmp_path_factory):
    """A bucket `acme` that holds the files, and the address of its server."""
    with pytest.MonkeyPatch.context() as patch, moto_process(tmp_path_factory.mktemp("moto")) as port:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="acme")
        for path in (files / "data").iterdir():
            client.put_object(Bucket="acme", Key=f"data/{path.name}", Body=path.read_bytes(), ACL="public-read")
        yield "127.0.0.1", port


@pytest.fixture
def other_store(tmp_path):
    """The address of a second server."""
    with moto_process(tmp_path) as port:
        yield "127.0.0.1", port


@pytest.fixture(scope="module")
def s3_proxy(store):
    proxy = FaultyProxy(*store)
    yield proxy
    proxy.stop()


@pytest.fixture
def s3(s3_proxy, monkeypatch):
    """A proxy without faults yet, which `s3://acme` is reached through."""
    s3_proxy.calm()
    monkeypatch.setenv(ENDPOINT, s3_proxy.url)
    return s3_proxy


@pytest.fixture
def web(files):
    """A proxy without faults yet, before a web server over the files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(WebHandler, directory=str(files))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        proxy = FaultyProxy("127.0.0.1", server.server_port)
        yield proxy
        proxy.stop()
        server.shutdown()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Backoff is shown elsewhere; here it would only take time. Every test has gates of its own."""
    monkeypatch.setattr(storage_retry.RetryPolicy, "wait_s", lambda self, attempt, asked_for_s=0.0: 0.001)
    monkeypatch.setattr(storage_throttle, "_GATES", {})


def rows_served(*paths: str, **options) -> Counter[int]:
    """Rows of one epoch, read back from the token ids that a batch holds."""
    sources = (TrainSource(path=paths, format="text", storage_options=options),)
    data = Data(train=sources, sequence_length=32, pack_buffer=4)
    recipe = Recipe(name="t", model=Model(path="m"), data=data, train=Train(global_batch_size=4, num_epochs=1))
    opened = open_stream(
        index=build_index(sources, ["s"], block_bytes=120), recipe=recipe, world_rank=0, world_size=1, streams=4,
        encode=encode, collate=lay_out,
    )  # fmt: skip
    served: Counter[int] = Counter()
    try:
        while (step := opened.next_step()).num_bins:
            for micro in step.micro_batches:
                for place, rows in enumerate(micro.batch.rows):
                    starts = np.flatnonzero(micro.batch.position_ids[place] == 0)[: len(rows)]
                    served.update((micro.batch.input_ids[place, starts] - 1).tolist())
    finally:
        opened.close()
    return served


EVERY_ROW_ONCE = Counter(range(ROWS))


@pytest.mark.parametrize("kind", [*PASSING, "mixed"])
def test_every_row_comes_once_whatever_happens_on_the_way_from_s3(s3, kind):
    s3.rates = dict.fromkeys(PASSING, 0.06) if kind == "mixed" else {kind: 0.3}
    assert rows_served("s3://acme/data") == EVERY_ROW_ONCE
    assert s3.counts.total() - s3.counts["untouched"] >= 4, s3.counts


@pytest.mark.parametrize("kind", [*PASSING, "mixed"])
def test_every_row_comes_once_whatever_happens_on_the_way_over_http(web, kind):
    web.rates = dict.fromkeys(PASSING, 0.06) if kind == "mixed" else {kind: 0.3}
    web.applies = lambda method, path: True
    assert rows_served(f"{web.url}/data/a%20%C3%BC.parquet", f"{web.url}/data/b.jsonl") == EVERY_ROW_ONCE
    assert web.counts.total() - web.counts["untouched"] >= 4, web.counts


def test_files_are_written_whole_whatever_happens_on_the_way(s3):
    s3.applies = lambda method, path: method in ("PUT", "POST")
    s3.rates = {"reset": 0.1, "slow_down": 0.1, "error": 0.1}
    data = bytes(range(256)) * (storage.WRITE_BLOCK_BYTES // 200)
    for number in range(16):
        storage.write_bytes(f"s3://acme/written/{number}", b"%d" % number)
    with storage.open_write("s3://acme/written/long") as file:
        file.write(data)
    assert [storage.read_bytes(f"s3://acme/written/{n}") for n in range(16)] == [b"%d" % n for n in range(16)]
    assert storage.read_bytes("s3://acme/written/long") == data
    assert s3.counts.total() > s3.counts["untouched"]


def test_files_in_parts_are_whole_whatever_happens_on_the_way(s3):
    s3.applies = lambda method, path: method in ("PUT", "POST")
    s3.rates = {"reset": 0.15, "slow_down": 0.15, "error": 0.15, "cut": 0.1}
    uploads = storage.PartUploads("s3://acme")
    size = storage.part_bytes(0)
    for number in range(4):
        url, data = f"s3://acme/written/parts-{number}", bytes([number]) * (2 * size + number)
        upload = uploads.begin(url)
        blocks = [data[start : start + size] for start in range(0, len(data), size)]
        marks = [uploads.send(url, upload, i, block, zlib.crc32(block)) for i, block in enumerate(blocks, 1)]
        uploads.finish(url, upload, marks, len(data))
        assert storage.read_bytes(url) == data
    assert s3.counts.total() > s3.counts["untouched"]


@pytest.mark.parametrize("kind", [kind for kind in PASSING if kind != "delay"])
def test_trouble_that_stays_ends_with_an_infrastructure_error(s3, kind):
    index = build_index([Source(path="s3://acme/data", format="text")], ["s"])
    s3.rates = {kind: 1.0}
    with pytest.raises(InfrastructureError, match=r"cannot read s3://acme/data/.* \(tried 16 times\)") as caught:
        index.read_block(0)
    assert caught.value.exit_code == 2
    assert s3.counts[kind] >= 16  # aiohttp asks again by itself after a reset


def test_a_store_that_is_throttled_is_asked_less_at_once(s3):
    s3.rates = {"slow_down": 0.4}
    assert rows_served("s3://acme/data") == EVERY_ROW_ONCE
    (gate,) = [gate for (scheme, _), gate in storage_throttle._GATES.items() if scheme == "s3"]
    assert gate.limit < storage_throttle.MOST_REQUESTS
    assert gate.counts["throttled"] == s3.counts["slow_down"] > 0


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("AccessDenied", UserError, "access denied.*AWS_ACCESS_KEY_ID"),
        ("RequestTimeTooSkewed", InfrastructureError, "the clock of .* is wrong.*timedatectl"),
        ("ExpiredToken", UserError, "credentials have expired.*goes on where it was"),
        ("InvalidAccessKeyId", UserError, "does not accept the key.*AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", UserError, "does not accept the key.*AWS_SECRET_ACCESS_KEY"),
        ("AuthorizationHeaderMalformed", UserError, "another region.*region_name"),
        ("NoSuchBucket", UserError, "no such bucket at this endpoint"),
        ("InvalidObjectState", UserError, "archived.*Glacier"),
    ],
)
def test_refusals_are_said_at_once_with_what_to_do(s3, code, error, words):
    assert set(REFUSALS) >= {code}
    index = build_index([Source(path="s3://acme/data", format="text")], ["s"])
    s3.rates = {code: 1.0}
    with pytest.raises(error, match=f"s3://acme/data/.*{words}"):
        index.read_block(0)
    assert s3.counts[code] == 1


def test_a_source_that_nobody_may_list(s3):
    s3.rates = {"AccessDenied": 1.0}
    s3.applies = lambda method, path: "list-type" in path or method == "HEAD"
    with pytest.raises(UserError, match=r"s3://acme/data.*access denied.*allow to list.*named one by one"):
        build_index([Source(path="s3://acme/data", format="text")], ["s"])


def test_options_of_access_reach_the_requests(s3):
    assert rows_served("s3://acme/data", anon=True) == EVERY_ROW_ONCE
    assert [head for head in s3.heads if b"\r\nauthorization:" in head.lower()] == []
    s3.heads.clear()
    assert rows_served("s3://acme/data", requester_pays=True) == EVERY_ROW_ONCE
    assert all(b"\r\nx-amz-request-payer: requester" in head.lower() for head in s3.heads if b".parquet" in head)


def change(client, name: str) -> None:
    body = client.get_object(Bucket="acme", Key=name)["Body"].read()
    client.put_object(Bucket="acme", Key=name, Body=body.replace(b"1", b"2"))


def test_an_object_that_changes_in_mid_run_is_named_and_never_mixed(s3):
    client = boto3.client("s3")
    url = "s3://acme/changing.jsonl"
    storage.write_bytes(url, b'{"text": "1 1"}\n' * 1000)
    index = build_index([Source(path=url, format="text")], ["s"], block_bytes=1200)
    assert index.read_block(0).num_rows == 75
    change(client, "changing.jsonl")
    with pytest.raises(UserError, match=rf"{url}: changed while it was read .*--accept-changed-data .*--fresh"):
        index.read_block(1)
    storage.write_bytes(url, b"short\n")
    with pytest.raises(UserError, match=rf"{url}: .*(changed|shorter)"):
        index.read_block(12)
    storage.delete_tree(url)
    with pytest.raises(UserError, match=f"{url}: not found"):
        index.read_block(2)


@pytest.mark.parametrize("place", ["web", "local", "memory"])
def test_other_files_that_change_in_mid_run_are_named(place, web, files, tmp_path):
    url = {"web": f"{web.url}/changing.jsonl", "local": str(files / "changing.jsonl"), "memory": "memory://b/c.jsonl"}
    target = {**url, "web": url["local"]}[place]
    storage.write_bytes(target, b'{"text": "1 1"}\n' * 1000)
    index = build_index([Source(path=url[place], format="text")], ["s"], block_bytes=1200)
    assert index.read_block(0).num_rows == 75
    storage.write_bytes(target, b'{"text": "2 2"}\n' * 1000)
    with pytest.raises(UserError, match=r"changing\.jsonl: changed while|c\.jsonl: changed while"):
        index.read_block(1)


def test_an_endpoint_that_speaks_something_else(web, store):
    options = {"endpoint_url": web.url}
    with pytest.raises(UserError, match=r"s3://acme/data: no data files found.*the bucket neither"):
        build_index([Source(path="s3://acme/data", format="text", storage_options=options)], ["s"])


def test_http_credentials_come_from_netrc(web, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    options = {"client_kwargs": {"trust_env": True}}
    rows_served(f"{web.url}/data/a%20%C3%BC.parquet", **options)
    assert all(b"\r\nauthorization: basic" in head.lower() for head in web.heads)


@pytest.fixture
def no_credentials(s3, monkeypatch):
    """Nothing that a client would sign its requests with."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    s3fs.S3FileSystem.clear_instance_cache()


def recipe_over_the_bucket(folder: Path) -> str:
    """Rows from `s3://acme/data`, everything else in `folder`."""
    recipe = recipe_for(folder, train={"max_steps": 2})
    recipe["data"] |= {"train": [{"path": "s3://acme/data", "format": "text"}], "eval": []}
    return str(write_recipe(folder / "bucket.yaml", recipe))


def test_a_plan_without_credentials_says_what_it_cannot_know(no_credentials, tmp_path, capsys):
    path = recipe_over_the_bucket(tmp_path)
    for place in ("s3://acme/data", "s3://acme/data/*.parquet", "s3://acme/*.parquet"):
        assert cli.main(["plan", path, f"data.train.0.path={place}"]) == 0
        found = " ".join(capsys.readouterr().out.split())
        assert re.search(r"unknown: s3://acme(/data)?: no credentials", found), found
    assert cli.main(["plan", path, "--strict"]) == 1
    assert "no credentials" in capsys.readouterr().err


def test_a_run_over_a_bucket_that_refuses_ends_with_the_remedy(s3, tmp_path, capsys):
    path = recipe_over_the_bucket(tmp_path)
    s3.rates = {"AccessDenied": 1.0}
    s3.applies = lambda method, path: "list-type" in path or method == "HEAD"
    for command in (entry.main, cli.main):
        assert command([path]) == 1
        said = capsys.readouterr()
        assert re.search(r"s3://acme/data.*access denied.*allow to list", " ".join(said.err.split())), said
        assert "Traceback" not in said.out + said.err
    s3.applies = lambda method, path: method == "GET" and "list-type" not in path
    assert entry.main([path, "name=reading"]) == 1
    assert re.search(r"s3://acme/data/.*access denied.*AWS_ACCESS_KEY_ID", " ".join(capsys.readouterr().err.split()))


def test_a_run_whose_clock_is_wrong_is_no_mistake_of_the_recipe(s3, tmp_path, capsys):
    path = recipe_over_the_bucket(tmp_path)
    s3.rates = {"RequestTimeTooSkewed": 1.0}
    s3.applies = lambda method, path: True
    for command in (entry.main, cli.main):
        assert command([path]) == 2
        said = capsys.readouterr()
        assert re.search(r"s3://acme/data.*the clock of .* is wrong.*timedatectl", " ".join(said.err.split())), said
        assert "Traceback" not in said.out + said.err


def test_a_run_whose_data_changes_under_it_stops_and_goes_on_where_it_is_told_to(s3, tmp_path, capsys, monkeypatch):
    key = "changes/rows.parquet"
    before, after = (write_parquet(tmp_path / f"{n}.parquet", text_rows(24, seed=n), row_group_size=2) for n in (0, 1))
    storage.write_bytes(f"s3://acme/{key}", before.read_bytes())
    # So that every epoch reads the file again, not long before its rows are learned.
    for module, name in (
        (stream, "CACHE_BYTES"),
        (order, "WINDOW_BYTES"),
        (lanes, "WINDOW_BYTES"),
        (feed, "AHEAD_STEPS"),
    ):
        monkeypatch.setattr(module, name, 1)

    def emit(_, event) -> None:
        if event["kind"] == "step" and event["step"] == 1:
            storage.write_bytes(f"s3://acme/{key}", after.read_bytes())

    recipe = recipe_for(tmp_path, train={"max_steps": 20, "global_batch_size": 4}, checkpoint={"every_steps": 2})
    recipe["data"] |= {"train": [{"path": f"s3://acme/{key}", "format": "text"}], "eval": [], "streams": 1}
    path = str(write_recipe(tmp_path / "changing.yaml", recipe))
    with monkeypatch.context() as patch:
        patch.setattr(entry.PlainMonitor, "emit", emit)
        assert entry.main([path]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(rf"s3://acme/{key}: (changed while|.*it was changed).*--accept-changed-data.*--fresh", said), said
    assert entry.main([path]) == 1
    assert "no longer what this run was started on" in capsys.readouterr().err
    assert entry.main([path, "--accept-changed-data"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"files of data\.train have changed: epoch \d+ begins again on them", said), said
    assert "step: step=20 " in said


def test_without_credentials_the_variables_are_named(no_credentials):
    with pytest.raises(UserError, match=r"s3://acme/data: no credentials.*AWS_ACCESS_KEY_ID.*anon: true"):
        build_index([Source(path="s3://acme/data", format="text")], ["s"])
    options = {"profile": "nobody"}
    with pytest.raises(UserError, match=r"s3://acme/data: no credentials.*profile \(nobody\)"):
        build_index([Source(path="s3://acme/data", format="text", storage_options=options)], ["s"])


def test_two_stores_with_endpoints_of_their_own_in_one_recipe(store, other_store, files, monkeypatch):
    """The same bucket name at two endpoints, and a local file besides; the options come back with a stored index."""
    monkeypatch.delenv(ENDPOINT, raising=False)
    endpoints = [f"http://{host}:{port}" for host, port in (store, other_store)]
    boto3.client("s3", endpoint_url=endpoints[1]).create_bucket(Bucket="acme")
    options = [{"endpoint_url": endpoint} for endpoint in endpoints]
    lines = b'{"text": "900 3"}\n{"text": "901 3"}\n'
    boto3.client("s3", endpoint_url=endpoints[1]).put_object(Bucket="acme", Key="data/c.jsonl", Body=lines)
    sources = [Source(path="s3://acme/data", format="text", storage_options=each) for each in options]
    sources.append(Source(path=str(files / "data/b.jsonl"), format="text"))
    index = build_index(sources, ["one", "two", "here"])
    assert [file.url.rpartition("/")[2] for file in index.select(1).files] == ["c.jsonl"]
    assert isinstance(index_source(sources[1], "two"), Index), "a plan looks where the options say"
    index.save(str(files / "run"), "train")
    again = Index.load(str(files / "run"), "train")
    assert again.files == index.files
    assert sum(again.read_block(block).num_rows for block in range(again.num_blocks)) == ROWS + 2 + 120
    assert not find_changes(again, sources)
    boto3.client("s3", endpoint_url=endpoints[0]).put_object(Bucket="acme", Key="data/c.jsonl", Body=b"{}")
    assert find_changes(again, sources).added == ("s3://acme/data/c.jsonl: new since the run began",)
    boto3.client("s3", endpoint_url=endpoints[0]).delete_object(Bucket="acme", Key="data/c.jsonl")
    moved = again.with_options([sources[0], Source(path="s3://acme/data", format="text"), sources[2]])
    assert json.loads(moved.select(1).files[0].options) == {}


def test_nobody_at_the_endpoint_is_told_after_few_tries():
    options = storage.options_text({"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(InfrastructureError, match=r"tried 3 times.*Nobody answers there.*endpoint_url"):
        storage.list_files("s3://acme/data", options=options)
    options = storage.options_text({"endpoint_url": "http://no-such-host.invalid"})
    with pytest.raises(InfrastructureError, match=r"tried 3 times.*Nobody answers there.*name service"):
        storage.info("s3://acme/data/b.jsonl", options=options)


def test_a_stores_retry_after_reaches_the_wait(web, monkeypatch):
    asked: list[float] = []
    monkeypatch.setattr(
        storage_retry.RetryPolicy, "wait_s", lambda self, attempt, asked_for_s=0.0: asked.append(asked_for_s) or 0.0
    )
    web.rates, web.retry_after = {"slow_down": 0.5}, "3"
    file = storage.info(f"{web.url}/data/b.jsonl")
    while not web.counts["slow_down"]:
        storage.read_file(file, 0, 10)
    assert set(asked) == {3.0}
