"""A model hub on loopback: repositories with commits, spoken to by the real `huggingface_hub` through `HF_ENDPOINT`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

API = re.compile(
    r"^/api/(?:models|datasets)/(?P<id>[^/]+/[^/]+)"
    r"(?:/(?P<verb>revision|tree)/(?P<revision>[^/]+)(?:/(?P<below>.*))?)?$"
)
PATHS_INFO = re.compile(r"^/api/datasets/(?P<id>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)$")
RESOLVE = re.compile(r"^/(?:datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")

Files = dict[str, bytes]


class Hub:
    """Repositories by id; `main` is the newest commit of each."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.commits: dict[str, dict[str, Files]] = {}
        self.asked: list[str] = []
        """Paths of the requests so far."""

    def push(self, repository: str, files: Files | Path) -> str:
        """A new commit of these files, or of a folder; its hash."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        history = self.commits.setdefault(repository, {})
        parts = [f"{len(history)}"] + [f"{name}\0{oid(data)}" for name, data in sorted(files.items())]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        history[commit] = files
        return commit

    def find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """Commit and files of a revision."""
        history = self.commits.get(repository, {})
        commit = list(history)[-1] if revision in ("main", "") and history else revision
        return (commit, history[commit]) if commit in history else None

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to use this hub, with a cache of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def oid(data: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that listens on loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_POST(self) -> None:
            """What is known of some paths of a dataset (HfFileSystem.info)."""
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            match = PATHS_INFO.match(path)
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            found = hub.find(match["id"], match["revision"]) if match else None
            status, headers, data = described(found[1], wanted) if found else missing("RepoNotFound")
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            status, headers, data = answer(hub, path, recursive="recursive=true" in self.path.lower())
            if status == 200 and (wanted := self.headers.get("Range")):
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
                stop = min(len(data), int(last) + 1 if last else len(data))
                headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
                status, data = 206, data[int(first) : stop]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def answer(hub: Hub, path: str, *, recursive: bool = True) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request's answer."""
    if match := API.match(path):
        found = hub.find(match["id"], match["revision"] or "main")
        if found is None:
            return missing("RevisionNotFound" if match["id"] in hub.commits else "RepoNotFound")
        return listing(match["id"], match["verb"], match["below"] or "", *found, recursive)
    if match := RESOLVE.match(path):
        found = hub.find(match["id"], match["revision"])
        if found is None or match["file"] not in found[1]:
            return missing("EntryNotFound" if found else "RepoNotFound")
        data = found[1][match["file"]]
        return 200, {"ETag": f'"{oid(data)}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}, data
    return missing("RepoNotFound")


def listing(
    repository: str, verb: str | None, below: str, commit: str, files: Files, recursive: bool
) -> tuple[int, dict[str, str], bytes]:
    """A repository's description, or its tree."""
    if verb == "tree":
        content: object = tree(files, f"{below}/" if below else "", recursive)
    else:
        content = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in sorted(files)]}
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def tree(files: Files, below: str, recursive: bool) -> list[dict[str, object]]:
    """Files and folders in a folder, directly or at any depth."""
    entries: dict[str, dict[str, object]] = {}
    for name, data in sorted(files.items()):
        parts = name.removeprefix(below).split("/") if name.startswith(below) else []
        for depth in range(1, len(parts)):
            path = below + "/".join(parts[:depth])
            entries[path] = {"type": "directory", "path": path, "oid": oid(path.encode())}
        if parts:
            entries[name] = {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
    return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(below)]


def described(files: Files, wanted: list[str]) -> tuple[int, dict[str, str], bytes]:
    """Files and folders among these paths."""
    content: list[dict[str, object]] = []
    for path in wanted:
        if path in files:
            content.append({"type": "file", "path": path, "size": len(files[path]), "oid": oid(files[path])})
        elif any(name.startswith(f"{path}/") for name in files):
            content.append({"type": "directory", "path": path, "oid": oid(path.encode())})
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def missing(code: str) -> tuple[int, dict[str, str], bytes]:
    """404, as the hub says it."""
    return 404, {"X-Error-Code": code, "X-Error-Message": code}, b""
