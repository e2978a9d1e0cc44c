"""What a checkpoint asks of S3 besides reading: an object store over a folder that takes uploads, for benchmarks.

PUT, multipart uploads whose parts come in any order and at once, deletion, and creation under a condition. A part is
written to a file of its own straight from the socket; completing an upload moves no byte, as in a real store. Nothing
is checked (signatures, checksums) and nothing is synced: it costs as little as a server in Python can.
"""

from __future__ import annotations

import argparse
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from object_store import Handler, Link, Server

BLOCK = 2**20
"""What is taken from a socket at once."""

PARTS = ".parts"
"""Folder of what has been uploaded, in a bucket's folder beside the objects."""


@dataclass(frozen=True)
class Part:
    """Bytes [start, stop) of an object, in a file."""

    path: Path
    start: int
    stop: int


class UploadHandler(Handler):
    """Adds writing. An object that came in parts is an empty file of its size here, and `assembled` has its bytes."""

    assembled: dict[Path, list[Part]]

    def do_PUT(self) -> None:  # noqa: N802 - the name that http.server calls
        path, query = self._asked()
        if "partNumber" in query:
            part = self._uploads(path) / query["uploadId"][0] / f"{int(query['partNumber'][0]):05d}"
            if not part.parent.is_dir():
                self._text(b"<Error><Code>NoSuchUpload</Code></Error>", "application/xml", 404)
                return
            self._receive(part)
        elif len(path.relative_to(self.root).parts) == 1:
            path.mkdir(exist_ok=True)
        elif self.headers.get("If-None-Match") == "*" and path.exists():
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._text(b"<Error><Code>PreconditionFailed</Code></Error>", "application/xml", 412)
            return
        else:
            self._forget(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._receive(path)
        self._done()

    def do_POST(self) -> None:  # noqa: N802 - the name that http.server calls
        path, query = self._asked()
        said = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if "uploads" in query:
            upload = uuid.uuid4().hex
            (self._uploads(path) / upload).mkdir(parents=True)
            self._said(f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>")
        elif "uploadId" in query:
            numbers = [int(number) for number in re.findall(r"<PartNumber>(\d+)</PartNumber>", said)]
            self._assemble(path, self._uploads(path) / query["uploadId"][0], numbers)
            self._said('<CompleteMultipartUploadResult><ETag>"whole"</ETag></CompleteMultipartUploadResult>')
        else:
            for key in re.findall(r"<Key>(.*?)</Key>", said):
                self._forget(path / key)
            self._said("<DeleteResult></DeleteResult>")

    def do_DELETE(self) -> None:  # noqa: N802 - the name that http.server calls
        path, query = self._asked()
        if "uploadId" in query:
            folder = self._uploads(path) / query["uploadId"][0]
            for part in folder.iterdir() if folder.is_dir() else ():
                part.unlink()
        else:
            self._forget(path)
        self._text(b"", "application/xml", 204)

    def _asked(self) -> tuple[Path, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        self.counts["requests"] += 1
        return self.root / unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)

    def _uploads(self, path: Path) -> Path:
        return self.root / path.relative_to(self.root).parts[0] / PARTS

    def _receive(self, path: Path) -> None:
        left = int(self.headers.get("Content-Length", 0))
        room = memoryview(bytearray(BLOCK))
        with path.open("wb", buffering=0) as file:
            while left:
                count = self.rfile.readinto1(room[: min(left, BLOCK)])  # type: ignore[attr-defined]
                self.link.send(count)
                file.write(room[:count])
                left -= count
                self.counts["received"] = self.counts.get("received", 0) + count

    def _assemble(self, path: Path, folder: Path, numbers: list[int]) -> None:
        parts, end = [], 0
        for file in (folder / f"{number:05d}" for number in numbers):
            size = file.stat().st_size
            parts.append(Part(file, end, end + size))
            end += size
        self._forget(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, end)
        self.assembled[path] = parts

    def _forget(self, path: Path) -> None:
        for part in self.assembled.pop(path, []):
            part.path.unlink()
        if not path.is_dir():  # clients delete what would mark a folder, too
            path.unlink(missing_ok=True)

    def _done(self) -> None:
        self.send_response(200)
        self.send_header("ETag", '"part"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _said(self, xml: str) -> None:
        self._text(b'<?xml version="1.0"?>' + xml.encode(), "application/xml")

    def _send(self, file: Path, start: int, stop: int) -> None:
        for path, first, last in self._pieces(file, start, stop):
            super()._send(path, first, last)

    def _pieces(self, file: Path, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
        """Where bytes of an object lie: (file, start, stop)."""
        if file not in self.assembled:
            yield file, start, stop
        for part in self.assembled.get(file, ()):
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                yield part.path, low - part.start, high - part.start


def serve(root: Path, *, line: Any = None) -> None:
    """Answer until the process ends; `line`, a connection or nothing, is told the address first."""
    UploadHandler.root, UploadHandler.link, UploadHandler.latency_s = root, Link(0.0), 0.0
    UploadHandler.counts, UploadHandler.assembled = {"requests": 0, "bytes": 0}, {}
    server = Server(("127.0.0.1", 0), UploadHandler)
    address = f"http://127.0.0.1:{server.server_port}"
    print(address, flush=True) if line is None else line.send(address)
    server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="its folders are buckets")
    serve(parser.parse_args().root)


if __name__ == "__main__":
    main()
