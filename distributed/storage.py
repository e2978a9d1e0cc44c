"""Every byte to or from anywhere: plain paths and fsspec URLs, with retries and errors that say what to do.

Functions take a URL (a plain path, or `s3://`, `gs://`, `http://`, `memory://` ...). Errors that the user can mend
(not found, access denied, a missing package) are `UserError`s that name the URL; trouble that passes (5xx, resets,
time-outs, short reads) is retried with full-jitter backoff and only then an `InfrastructureError`.
S3 endpoints and credentials come from the environment, as botocore reads them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..recipes.errors import InfrastructureError, UserError
from .storage_errors import definite_error
from .storage_retry import RETRY, RetryPolicy, ShortReadError, retrying

WRITE_BLOCK_BYTES = 16 * 2**20
"""Part size of streamed uploads; S3 allows 10,000 parts, so files up to 160 GB."""


@dataclass(frozen=True)
class FileInfo:
    """A stored file. `etag` changes when the content does: the store's ETag, or mtime and size where it has none."""

    url: str
    size: int
    etag: str


def is_local(url: str) -> bool:
    """True for plain paths and file:// URLs."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(url.removeprefix("file://"))


def join(url: str, *parts: str) -> str:
    """The URL of something below `url`."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path on it. Listings are never cached: other ranks write too."""
    import fsspec

    try:
        if is_local(url):
            return fsspec.filesystem("file"), str(local_path(url).absolute())
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise definite_error(url, error) or error from error
    return fs, str(path)


def _full_url(fs: Any, path: str, url: str) -> str:
    return path if is_local(url) else str(fs.unstrip_protocol(path))


def _info(fs: Any, entry: dict[str, Any], url: str) -> FileInfo:
    tags = (entry.get(key) for key in ("ETag", "etag", "md5Hash", "md5", "content_md5"))
    etag = next((str(tag) for tag in tags if tag), "")
    size = entry["size"]
    if size is None:
        raise UserError(f"{url}: the server does not say how long the file is, so it cannot be read in ranges")
    if is_local(url):
        etag = f"{Path(entry['name']).stat().st_mtime_ns}-{size}"
    changed = entry.get("LastModified") or entry.get("mtime") or entry.get("created") or ""
    return FileInfo(_full_url(fs, entry["name"], url), int(size), etag or f"{changed}-{size}")


def info(url: str, retry: RetryPolicy = RETRY) -> FileInfo:
    """Size and etag of one file. Raises UserError when there is none."""
    fs, path = filesystem(url)

    def look() -> FileInfo:
        entry = fs.info(path)
        if entry["type"] == "directory":
            raise UserError(f"{url} is a folder, not a file")
        return _info(fs, {**entry, "name": path}, url)

    return retrying("look at", url, look, retry)


def exists(url: str, retry: RetryPolicy = RETRY) -> bool:
    """True when there is a file or folder at `url`."""
    fs, path = filesystem(url)
    return retrying("look for", url, lambda: bool(fs.exists(path)), retry)


def is_folder(url: str, retry: RetryPolicy = RETRY) -> bool:
    """True when `url` is a folder (on object stores: a prefix with something below it)."""
    fs, path = filesystem(url)
    return retrying("look for", url, lambda: bool(fs.isdir(path)), retry)


def _hidden(path: str, base: str) -> bool:
    below = path[len(base) :] if path.startswith(base) else posixpath.basename(path)
    return any(part.startswith((".", "_")) for part in below.split("/") if part)


def list_files(pattern: str, suffixes: Sequence[str] = (), retry: RetryPolicy = RETRY) -> list[FileInfo]:
    """The files that a path means, sorted by URL: a file, every file below a folder, or a glob's matches.

    Below folders and in globs, names that begin with `.` or `_` are left out, and in folders names that do not end
    in one of `suffixes`. Nothing there: an empty list."""
    fs, path = filesystem(pattern)
    magic = any(character in path for character in "*?[") and not pattern.startswith(("http://", "https://"))

    def look() -> list[FileInfo]:
        if not magic or fs.exists(path):
            return _below(fs, path, pattern, suffixes)
        base = path[: min(path.index(c) for c in "*?[" if c in path)].rpartition("/")[0]
        found = fs.glob(path, detail=True)
        return [
            _info(fs, entry, pattern)
            for name, entry in sorted(found.items())
            if entry["type"] == "file" and not _hidden(name, base)
        ]

    return retrying("list", pattern, look, retry)


def _below(fs: Any, path: str, url: str, suffixes: Sequence[str]) -> list[FileInfo]:
    try:
        entry = fs.info(path)
    except FileNotFoundError:
        return []
    if entry["type"] == "file":
        return [_info(fs, {**entry, "name": path}, url)]
    found = fs.find(path, detail=True)
    names = [n for n in sorted(found) if not _hidden(n, path) and (not suffixes or n.endswith(tuple(suffixes)))]
    return [_info(fs, found[name], url) for name in names]


def list_names(url: str, retry: RetryPolicy = RETRY) -> list[str]:
    """Names of files and folders directly below `url`, sorted; empty when there is no such folder."""
    fs, path = filesystem(url)

    def look() -> list[str]:
        try:
            entries = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({posixpath.basename(str(entry).rstrip("/")) for entry in entries} - {""})

    return retrying("list", url, look, retry)


def read_range(url: str, start: int, stop: int, retry: RetryPolicy = RETRY) -> bytes:
    """Bytes [start, stop) of a file; the length is verified and a short answer asked for again."""
    fs, path = filesystem(url)
    if stop <= start:
        return b""

    def read() -> bytes:
        data = bytes(fs.cat_file(path, start=start, end=stop))
        if len(data) > stop - start:
            raise UserError(f"{url}: the server ignores ranges (asked for {stop - start} bytes, got {len(data)})")
        if len(data) < stop - start:
            raise ShortReadError(f"got {len(data)} of bytes {start} to {stop}")
        return data

    return retrying("read", url, read, retry)


def read_bytes(url: str, retry: RetryPolicy = RETRY) -> bytes:
    """A whole file."""
    fs, path = filesystem(url)
    return retrying("read", url, lambda: bytes(fs.cat_file(path)), retry)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A file beside `path` to be renamed or linked to it: nobody ever sees a half-written one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(url: str, data: bytes, retry: RetryPolicy = RETRY) -> None:
    """Write a whole file; readers see the old content or the new, never a part."""

    def write_local() -> None:
        path = local_path(url)
        with _temporary(path) as temporary:
            _write_synced(temporary, data)
            temporary.replace(path)
        _sync_folder(path.parent)

    def write_remote() -> None:
        fs, path = filesystem(url)
        fs.pipe_file(path, data)

    retrying("write", url, write_local if is_local(url) else write_remote, retry)


def create_exclusive(url: str, data: bytes, retry: RetryPolicy = RETRY) -> bool:
    """Write a file that must not be there yet; False when it is, and then nothing changes.

    Atomic among all writers: a hard link on local disks, `If-None-Match: *` on object stores. An answer that got
    lost on the way may make a success look like False; a caller that must know compares the content.
    Raises InfrastructureError for a store that cannot do it."""

    def link() -> bool:
        path = local_path(url)
        with _temporary(path) as temporary:
            _write_synced(temporary, data)
            os.link(temporary, path)
        _sync_folder(path.parent)
        return True

    def create() -> bool:
        fs, path = filesystem(url)
        try:
            fs.pipe_file(path, data, mode="create")
        except OSError as error:
            # Some S3-compatible stores answer 412 without naming the condition, of which s3fs makes EINVAL.
            if error.errno == errno.EINVAL and fs.exists(path):
                return False
            raise
        return True

    def attempt() -> bool:
        try:
            return link() if is_local(url) else create()
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError) as error:
            raise InfrastructureError(f"{url}: this store cannot create a file exclusively ({error})") from error

    return retrying("create", url, attempt, retry)


def delete_tree(url: str, retry: RetryPolicy = RETRY) -> None:
    """Remove a file or a folder with everything below; nothing there is fine."""

    def delete() -> None:
        fs, path = filesystem(url)
        if is_local(url) and Path(path).is_dir():
            shutil.rmtree(path)
            return
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    retrying("delete", url, delete, retry)


@contextlib.contextmanager
def open_write(url: str) -> Iterator[IO[bytes]]:
    """Stream a file out; it appears whole when the block ends, and not at all when the block raises."""
    try:
        if is_local(url):
            path = local_path(url)
            with _temporary(path) as temporary:
                with temporary.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            _sync_folder(path.parent)
            return
        fs, remote = filesystem(url)
        handle = fs.open(remote, "wb", block_size=WRITE_BLOCK_BYTES, autocommit=False)
        try:
            yield handle
            handle.close()
        except BaseException:
            handle.close()  # an open handle would finish the upload when it is collected
            handle.discard()
            raise
        handle.commit()
    except OSError as error:
        raise definite_error(url, error) or InfrastructureError(f"cannot write {url}: {error}") from error


def check_writable(url: str, retry: RetryPolicy = RETRY) -> None:
    """Write a small file below `url` and delete it. Raises UserError that names the place."""
    probe = join(url, f".ftlaunch-write-test-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"ftlaunch checks that it can write here\n", retry)
        delete_tree(probe, retry)
    except (UserError, InfrastructureError) as error:
        raise UserError(
            f"cannot write to {url}: {error}\nSet checkpoint.path to a place that this user may write to."
        ) from error


REWRITE_EVERY_S = 30.0
"""Object stores have no append; the whole object is written again, at most this often."""


def complete_lines(data: bytes) -> bytes:
    """Everything up to the last newline: a line that a crash tore is dropped."""
    return data[: data.rfind(b"\n") + 1]


class LineLog:
    """JSON lines that a later attempt continues. One writer at a time.

    Local files are appended to and flushed line by line. On object stores lines are kept in memory and the object
    is rewritten on `append` when `REWRITE_EVERY_S` have passed, on `flush` and on `close`. `clock` is in seconds.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self._clock = clock
        self._written_at = clock()
        self._local = is_local(url)
        stored = read_bytes(url) if exists(url) else b""
        kept = complete_lines(stored)
        self._lines = bytearray() if self._local else bytearray(kept)
        self._dirty = False
        if self._local:
            path = local_path(url)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            if len(kept) < len(stored):
                self._file.truncate(len(kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line."""
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if self._local:
            self._file.write(line)
            self._file.flush()
            return
        self._lines += line
        self._dirty = True
        if self._clock() - self._written_at >= REWRITE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Bring every line to"""
        if self._local:
            self._file.flush()
            os.fsync(self._file.fileno())
        elif self._dirty:
            write_bytes(self.url, bytes(self._lines))
            self._written_at = self._clock()
            self._dirty = False

    def close(self) -> None:
        """Flush and let go of the file."""
        self.flush()
        if self._local:
            self._file.close()
