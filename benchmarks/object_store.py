"""A read-only S3 server over a folder, for benchmarks: files are sent by the kernel, the link and its delay are set.

It knows what a reader asks (GET with ranges, HEAD, ListObjectsV2) and checks no signatures; loopback only. All
connections share one link of a given bandwidth, and every request waits one round trip first. `GET /-/counts` answers
with the bytes and requests served so far.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

CHUNK = 2**16
XML = "http://s3.amazonaws.com/doc/2006-03-01/"


class Link:
    """A line of `bytes_per_s` that everybody shares; 0: no limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def send(self, count: int) -> None:
        """Wait until `count` bytes have gone through."""
        if not self._rate:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + count / self._rate
            done = self._free_at
        time.sleep(max(0.0, done - time.perf_counter()))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    link: Link
    latency_s: float
    counts: dict[str, int]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY

    def _answer(self, *, body: bool) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)
        if path == "-/counts":
            self._text(json.dumps(self.counts).encode(), "application/json")
            return
        time.sleep(self.latency_s)
        self.counts["requests"] += 1
        file = self.root / path
        if file.is_file():
            self._file(file, body)
        elif "list-type" in query or ("/" not in path and body):
            self._text(self._listing(path, query), "application/xml")
        elif "/" not in path:
            self._text(b"", "application/xml")
        else:
            self._text(b"<Error><Code>NoSuchKey</Code></Error>" if body else b"", "application/xml", 404)

    def _text(self, data: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, file: Path, body: bool) -> None:
        stat = file.stat()
        start, stop = 0, stat.st_size
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else stop - int(last)
            stop = min(stop, int(last) + 1) if first and last else stop
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{stat.st_size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"')
        self.send_header("Last-Modified", self.date_time_string(int(stat.st_mtime)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            self._send(file, start, stop)

    def _send(self, file: Path, start: int, stop: int) -> None:
        self.wfile.flush()
        with file.open("rb") as source:
            while start < stop:
                count = min(CHUNK, stop - start)
                self.link.send(count)
                sent = os.sendfile(self.connection.fileno(), source.fileno(), start, count)
                start += sent
                self.counts["bytes"] += sent

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        keys = [str(path.relative_to(self.root / bucket)) for path in (self.root / bucket).rglob("*") if path.is_file()]
        found, folders = [], set()
        for key in sorted(key for key in keys if key.startswith(prefix)):
            below, separator, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            folders.add(f"{prefix}{below}/") if separator else found.append(key)
        entries = "".join(map(self._entry, [bucket] * len(found), found))
        entries += "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders)
        head = f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found) + len(folders)}</KeyCount>"
        return (
            f'<?xml version="1.0"?><ListBucketResult xmlns="{XML}">{head}<MaxKeys>100000</MaxKeys>'
            f"<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        ).encode()

    def _entry(self, bucket: str, key: str) -> str:
        stat = (self.root / bucket / key).stat()
        etag = f"&quot;{stat.st_mtime_ns:x}-{stat.st_size:x}&quot;"
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stat.st_mtime))
        return (
            f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified><ETag>{etag}</ETag>"
            f"<Size>{stat.st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    """Connections that may wait to be accepted: of socketserver's own 5 the sixth at once waits a second to try again,
    which no object store makes a client do."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Sides that have what they want leave in the middle of an answer; that is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="its folders are buckets")
    parser.add_argument("--mb-per-s", type=float, default=0.0, help="bandwidth of the link; 0: no limit")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="one round trip")
    options = parser.parse_args()
    Handler.root, Handler.link = options.root, Link(options.mb_per_s * 1e6)
    Handler.latency_s, Handler.counts = options.latency_ms / 1e3, {"requests": 0, "bytes": 0}
    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
