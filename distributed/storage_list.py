"""What is there: sizes, etags, listings."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..recipes.errors import UserError
from .storage_errors import protocol
from .storage_place import NO_OPTIONS, SAME_AS, FileInfo, filesystem, is_local
from .storage_retry import RETRY, RetryPolicy, retrying

TAGS = ("ETag", "etag", "md5Hash", "md5", "content_md5", "blob_id")
TIMES = ("LastModified", "Last-Modified", "mtime", "created")


def etag_of(entry: Mapping[str, Any], size: int) -> str:
    """What changes with the content, from what a store says about a file."""
    tag = next((str(entry[key]) for key in TAGS if entry.get(key)), "")
    changed = next((entry[key] for key in TIMES if entry.get(key)), "")
    # fsspec's listings give times as numbers where its `info` gives them as dates.
    return tag or f"{changed.timestamp() if isinstance(changed, datetime) else changed}-{size}"


def local_etag(mtime_ns: int, size: int) -> str:
    """The same for a local file."""
    return f"{mtime_ns}-{size}"


def _full_url(fs: Any, path: str, url: str) -> str:
    return path if is_local(url) else str(fs.unstrip_protocol(path))


def _info(fs: Any, entry: dict[str, Any], url: str, options: str) -> FileInfo:
    if entry["size"] is None:
        raise UserError(f"{url}: the server does not say how long the file is, so it cannot be read in ranges")
    size = int(entry["size"])
    etag = local_etag(Path(entry["name"]).stat().st_mtime_ns, size) if is_local(url) else etag_of(entry, size)
    return FileInfo(_full_url(fs, entry["name"], url), size, etag, options)


def _entry(fs: Any, path: str) -> dict[str, Any]:
    """`fs.info`, where fsspec's http calls whatever went wrong "not found"."""
    try:
        found: dict[str, Any] = fs.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__
        if path.startswith(("http://", "https://")) and isinstance(cause, Exception) and not _is_missing(cause):
            raise cause from None
        raise
    return found


def _is_missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or vars(error).get("status") in (404, 410)


def info(url: str, retry: RetryPolicy = RETRY, *, options: str = NO_OPTIONS) -> FileInfo:
    """Size and etag of one file. Raises UserError when there is none."""
    return retrying("look at", url, lambda: look_at(url, options), retry)


def look_at(url: str, options: str) -> FileInfo:
    """`info`, once; for what is tried again as a whole."""
    fs, path = filesystem(url, options)
    entry = _entry(fs, path)
    if entry["type"] == "directory":
        raise UserError(f"{url} is a folder, not a file")
    return _info(fs, {**entry, "name": path}, url, options)


def exists(url: str, retry: RetryPolicy = RETRY, *, options: str = NO_OPTIONS) -> bool:
    """True when there is a file or folder at `url`."""
    fs, path = filesystem(url, options)

    def look() -> bool:
        # s3fs's `exists` says no whatever went wrong with a bucket, and fsspec's http whatever went wrong.
        if "/" in path and not path.startswith(("http://", "https://")):
            return bool(fs.exists(path))
        try:
            _entry(fs, path)
        except FileNotFoundError:
            return False
        return True

    return retrying("look for", url, look, retry)


def is_folder(url: str, retry: RetryPolicy = RETRY, *, options: str = NO_OPTIONS) -> bool:
    """True when `url` is a folder (on object stores: a prefix with something below it)."""
    fs, path = filesystem(url, options)
    return retrying("look for", url, lambda: bool(fs.isdir(path)), retry)


def _hidden(path: str, base: str) -> bool:
    below = path[len(base) :] if path.startswith(base) else posixpath.basename(path)
    return any(part.startswith((".", "_")) for part in below.split("/") if part)


def list_files(
    pattern: str, suffixes: Sequence[str] = (), retry: RetryPolicy = RETRY, *, options: str = NO_OPTIONS
) -> list[FileInfo]:
    """The files that a path means, sorted by URL: a file, every file below a folder, or a glob's matches.

    Below folders and in globs, names that begin with `.` or `_` are left out, and in folders names that do not end
    in one of `suffixes`. Nothing there: an empty list."""
    fs, path = filesystem(pattern, options)
    magic = any(character in path for character in "*?[") and not pattern.startswith(("http://", "https://"))

    def look() -> list[FileInfo]:
        if not magic or fs.exists(path):
            return _below(fs, path, pattern, suffixes, options)
        base = path[: min(path.index(c) for c in "*?[" if c in path)].rpartition("/")[0]
        found = fs.glob(path, detail=True)
        return [
            _info(fs, entry, pattern, options)
            for name, entry in sorted(found.items())
            if entry["type"] == "file" and not _hidden(name, base)
        ]

    return retrying("list", pattern, look, retry)


FLAT = ("s3", "gs", "az")
"""Stores that have no folders: one listing of all names that begin with a path finds what lies below it."""


def _below(fs: Any, path: str, url: str, suffixes: Sequence[str], options: str) -> list[FileInfo]:
    try:
        # On flat stores the listing answers in one round trip what else takes three, and knows a file by its own name.
        found = fs.find(path, detail=True) if _is_flat(url) else {}
        entry = found.get(path) or ({} if found else _entry(fs, path))
    except FileNotFoundError:
        return []
    if entry.get("type") == "file":
        return [_info(fs, {**entry, "name": path}, url, options)]
    found = found or fs.find(path, detail=True)
    names = [n for n in sorted(found) if not _hidden(n, path) and (not suffixes or n.endswith(tuple(suffixes)))]
    return [_info(fs, found[name], url, options) for name in names]


def _is_flat(url: str) -> bool:
    return SAME_AS.get(protocol(url), protocol(url)) in FLAT


def list_names(url: str, retry: RetryPolicy = RETRY, *, options: str = NO_OPTIONS) -> list[str]:
    """Names of files and folders directly below `url`, sorted; empty when there is no such folder."""
    fs, path = filesystem(url, options)

    def look() -> list[str]:
        try:
            entries = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({posixpath.basename(str(entry).rstrip("/")) for entry in entries} - {""})

    return retrying("list", url, look, retry)
