"""Writing: files appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..recipes.errors import InfrastructureError, UserError
from .storage_errors import definite_error
from .storage_place import filesystem, is_local, join, local_path
from .storage_retry import RETRY, RetryPolicy, retrying

WRITE_BLOCK_BYTES = 16 * 2**20
"""Part size of streamed uploads; S3 allows 10,000 parts, so files up to 160 GB."""


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(url: str) -> None:
    """The names in a local folder are on the disk from now on."""
    _sync(local_path(url))


def write_bytes(url: str, data: bytes, retry: RetryPolicy = RETRY) -> None:
    """Write a whole file; readers see the old content or the new, never a part."""

    def write_local() -> None:
        path = local_path(url)
        with _temporary(path) as temporary:
            _write_synced(temporary, data)
            temporary.replace(path)
        _sync(path.parent)

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
        _sync(path.parent)
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


def link(source: str, target: str, retry: RetryPolicy = RETRY) -> bool:
    """Make `target`, which is not there yet, the same file as `source` (local: a hard link) or a copy of it that the
    store makes by itself. False where neither can be done. The two must be of one store, and never be changed in place.
    Raises UserError or InfrastructureError."""

    def copy() -> bool:
        fs, path = filesystem(source)
        try:
            fs.cp_file(path, filesystem(target)[1])
        except NotImplementedError:
            return False
        return True

    if is_local(source):
        return _link_local(local_path(source), local_path(target))
    return retrying("copy", source, copy, retry)


def _link_local(source: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # not there, too many names, or a file system that has no links
        return False
    _sync(target.parent)
    return True


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
def open_write(url: str, block_bytes: int = WRITE_BLOCK_BYTES) -> Iterator[IO[bytes]]:
    """Stream a file out; it appears whole when the block ends, and not at all when the block raises. An object store's
    client collects `block_bytes` before it sends them."""
    try:
        if is_local(url):
            path = local_path(url)
            with _temporary(path) as temporary:
                with temporary.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            _sync(path.parent)
            return
        fs, remote = filesystem(url, uploads=True)
        handle = fs.open(remote, "wb", block_size=block_bytes, autocommit=False)
        try:
            yield handle
            handle.close()
            handle.commit()
        except BaseException:
            handle.close()  # an open handle would finish the upload when it is collected
            handle.discard()  # parts that are left behind are paid for
            raise
    except OSError as error:
        raise definite_error(url, error) or InfrastructureError(f"cannot write {url}: {error}") from error


def check_writable(url: str, retry: RetryPolicy = RETRY, *, setting: str = "checkpoint.path") -> None:
    """Write a small file below `url` and delete it; a folder that was not there is gone again. Raises UserError that
    names the place and the `setting` that says it."""
    probe = join(url, f".ftlaunch-write-test-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"ftlaunch checks that it can write here\n", retry)
        delete_tree(probe, retry)
        if is_local(url):
            with contextlib.suppress(OSError):  # something is in it
                local_path(url).rmdir()
    except (UserError, InfrastructureError) as error:
        raise UserError(
            f"cannot write to {url}: {error}\nSet {setting} to a place that this user may write to."
        ) from error
