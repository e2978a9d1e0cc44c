"""The S3 client's shortcuts: the same answers, read the same way."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from botocore.utils import parse_timestamp

from ftlaunch.distributed import storage, storage_s3


@pytest.mark.parametrize(
    "value",
    [
        "Wed, 21 Oct 2015 07:28:00 GMT",
        "2015-10-21T07:28:00.000Z",
        "2015-10-21T07:28:00Z",
        "2015-10-21T09:28:00+02:00",
        "Oct 21 2015 07:28:00 UTC",
        1445412480,
        1445412480.5,
        "1445412480",
    ],
)
def test_times_are_those_that_botocore_reads(value):
    assert storage_s3.parse_time(value) == parse_timestamp(value)


def test_what_is_no_time_is_refused_as_botocore_does():
    with pytest.raises(ValueError, match="Invalid timestamp"):
        storage_s3.parse_time("tomorrow")


@pytest.fixture
def store(monkeypatch):
    """A store of one object; the User-Agents of what it was asked."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    agents: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            agents.append(self.headers["User-Agent"])
            self.send_response(206)
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"abc")

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", agents
    server.shutdown()


def test_requests_are_made_with_the_shortcuts(store, monkeypatch):
    endpoint, agents = store
    parsed: list[str] = []
    quick = storage_s3.parse_time
    monkeypatch.setattr(storage_s3, "parse_time", lambda value: parsed.append(value) or quick(value))
    options = storage.options_text({"endpoint_url": endpoint})
    file = storage.FileInfo("s3://bucket/key", 3, '"1"', options)
    assert storage.read_file(file) == b"abc"
    (agent,) = agents
    assert agent.startswith("ftlaunch botocore/")
    assert parsed == ["Wed, 21 Oct 2015 07:28:00 GMT"]


def test_a_profile_goes_to_the_session_and_is_named_where_it_is_not_there(store):
    endpoint, _ = store
    options = storage.options_text({"endpoint_url": endpoint, "profile": "not-there"})
    with pytest.raises(Exception, match="not-there"):
        storage.read_file(storage.FileInfo("s3://bucket/key", 3, '"1"', options))
