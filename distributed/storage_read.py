"""Bytes of files: whole, or ranges of one that must still be what it was when it was listed."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..recipes.errors import UserError
from .storage_errors import CHANGED_REMEDY, protocol
from .storage_list import etag_of, local_etag, look_at
from .storage_place import SAME_AS, FileInfo, filesystem, is_local, local_path
from .storage_retry import RETRY, RetryPolicy, ShortReadError, retrying

PART_BYTES = 32 * 2**20
"""Longer reads are cut: what a broken connection makes read again, and at once on several connections."""

PARTS_AT_ONCE = 8
HTTP_PARTIAL = 206


def read_range(url: str, start: int, stop: int, retry: RetryPolicy = RETRY) -> bytes:
    """Bytes [start, stop) of a file; the length is verified and a short answer asked for again."""
    fs, path = filesystem(url)
    if stop <= start:
        return b""
    return retrying(
        "read", url, lambda: _whole(url, bytes(fs.cat_file(path, start=start, end=stop)), start, stop), retry
    )


def read_into(url: str, start: int, target: memoryview, retry: RetryPolicy = RETRY) -> None:
    """Fill `target` with the bytes of a file from `start` on; on a local disk without another copy of them."""
    if not is_local(url):
        target[:] = read_range(url, start, start + len(target), retry)
        return

    def read() -> None:
        with local_path(url).open("rb", buffering=0) as file:
            place = 0
            while place < len(target):
                count = os.preadv(file.fileno(), [target[place:]], start + place)
                if not count:
                    raise ShortReadError(f"got {place} of bytes {start} to {start + len(target)}")
                place += count

    retrying("read", url, read, retry)


def read_bytes(url: str, retry: RetryPolicy = RETRY) -> bytes:
    """A whole file."""
    fs, path = filesystem(url)
    return retrying("read", url, lambda: bytes(fs.cat_file(path)), retry)


def read_file(file: FileInfo, start: int = 0, stop: int | None = None, retry: RetryPolicy = RETRY) -> bytes:
    """Bytes [start, stop) of a listed file, all of it by default.

    Raises UserError that names the file when it is no longer the one that was listed: old and new bytes never mix."""
    end = file.size if stop is None else stop
    if end - start <= PART_BYTES:
        return _read_part(file, start, end, retry)
    starts = range(start, end, PART_BYTES)
    with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="parts") as pool:
        return b"".join(pool.map(lambda at: _read_part(file, at, min(at + PART_BYTES, end), retry), starts))


def _read_part(file: FileInfo, start: int, stop: int, retry: RetryPolicy) -> bytes:
    if stop <= start:
        return b""
    kind = SAME_AS.get(protocol(file.url), protocol(file.url))
    read = _CHECKED.get(kind, _read_and_look)
    return retrying("read", file.url, lambda: _whole(file.url, read(file, start, stop), start, stop), retry)


def _whole(url: str, data: bytes, start: int, stop: int) -> bytes:
    if len(data) > stop - start:
        raise UserError(f"{url}: the server ignores ranges (asked for {stop - start} bytes, got {len(data)})")
    if len(data) < stop - start:
        raise ShortReadError(f"got {len(data)} of bytes {start} to {stop}")
    return data


def _unchanged(file: FileInfo, etag: str) -> None:
    if etag != file.etag:
        raise UserError(
            f"{file.url}: changed while it was read (was {file.etag}, is {etag}). A run reads the files it was started "
            f"on. {CHANGED_REMEDY}"
        )


def _read_local(file: FileInfo, start: int, stop: int) -> bytes:
    with local_path(file.url).open("rb", buffering=0) as opened:
        data = os.pread(opened.fileno(), stop - start, start)
        status = os.fstat(opened.fileno())
    _unchanged(file, local_etag(status.st_mtime_ns, status.st_size))
    return data


def _read_and_look(file: FileInfo, start: int, stop: int) -> bytes:
    """For stores whose answers do not say which version they are of: looks again after reading."""
    fs, path = filesystem(file.url, file.options)
    data = bytes(fs.cat_file(path, start=start, end=stop))
    _unchanged(file, look_at(file.url, file.options).etag)
    return data


def _read_only(file: FileInfo, start: int, stop: int) -> bytes:
    """For the Hugging Face hub, which bounds the number of questions: files of a commit do not change, and others are
    compared when a run starts."""
    fs, path = filesystem(file.url, file.options)
    return bytes(fs.cat_file(path, start=start, end=stop))


def _awaited(read: Callable[[Any, str, FileInfo, int, int], Awaitable[bytes]]) -> Callable[[FileInfo, int, int], bytes]:
    """A coroutine over a client, run on fsspec's own loop."""

    def run(file: FileInfo, start: int, stop: int) -> bytes:
        from fsspec.asyn import sync

        fs, path = filesystem(file.url, file.options)
        return bytes(sync(fs.loop, read, fs, path, file, start, stop))

    return run


async def _read_s3(fs: Any, path: str, file: FileInfo, start: int, stop: int) -> bytes:
    """One GET; its ETag is that of the version whose bytes follow. (`If-Match` would say the same, but not every
    S3-compatible store knows it.)"""
    bucket, key, version = fs.split_path(path)
    which = {"VersionId": version} if version else {}
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **which)
    try:
        _unchanged(file, answer["ETag"])
        data: bytes = await answer["Body"].read()
    finally:
        answer["Body"].close()
    return data


async def _read_http(fs: Any, path: str, file: FileInfo, start: int, stop: int) -> bytes:
    """One GET. Compressed on the way it would have another length, and ranges of something else."""
    session = await fs.set_session()
    headers = {**fs.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(path), **{**fs.kwargs, "headers": headers}) as answer:
        fs._raise_not_found_for_status(answer, path)
        if answer.status != HTTP_PARTIAL and stop - start < file.size:
            raise UserError(f"{file.url}: the server ignores ranges; it answers {answer.status} with the whole file")
        total = answer.headers.get("Content-Range", answer.headers.get("Content-Length", "0")).rpartition("/")[2]
        etag = etag_of(answer.headers, int(total))
        if etag != file.etag and "ETag" not in answer.headers:  # some servers tell it only when asked for nothing else
            etag = etag_of(await fs._info(path), file.size)
        _unchanged(file, etag)
        data: bytes = await answer.read()
    return data


_CHECKED: dict[str, Callable[[FileInfo, int, int], bytes]] = {
    "file": _read_local,
    "s3": _awaited(_read_s3),
    "http": _awaited(_read_http),
    "hf": _read_only,
}
