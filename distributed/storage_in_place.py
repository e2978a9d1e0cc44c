"""Writing ranges into local files that several processes of a host fill together.

Nothing here is atomic: a file counts only once somebody says so, as a checkpoint's commit record does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from ..recipes.errors import InfrastructureError
from .storage_errors import definite_error
from .storage_place import local_path

NO_ALLOCATION = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
"""A file system that cannot reserve space says one of these; it finds out that it is full when it is written to."""


def make_file(url: str, size: int) -> None:
    """A new local file of `size` bytes with its space reserved, so that a disk that is too full says so at once (and
    filling it is quicker than filling a hole). Raises UserError or InfrastructureError."""
    path = local_path(url)
    with local_errors(url):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _reserve(descriptor, size)
        finally:
            os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:  # macOS has none
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in NO_ALLOCATION:
                raise
    os.ftruncate(descriptor, size)


class RangeFile:
    """A local file that is there already, open for writing at any place; threads may share it."""

    def __init__(self, url: str) -> None:
        self._url = url
        with local_errors(url):
            self._descriptor = os.open(local_path(url), os.O_WRONLY)

    def write(self, offset: int, data: memoryview) -> None:
        """All of `data` at `offset`."""
        with local_errors(self._url):
            while data:
                written = os.pwrite(self._descriptor, data, offset)
                offset, data = offset + written, data[written:]

    def close(self, *, sync: bool) -> None:
        """Let go of it; `sync`: after everything that was written to it, by whomever, is on the disk."""
        try:
            if sync:
                with local_errors(self._url):
                    os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


@contextlib.contextmanager
def local_errors(url: str) -> Iterator[None]:
    """An OSError as what storage raises."""
    try:
        yield
    except OSError as error:
        raise definite_error(url, error) or InfrastructureError(f"cannot write {url}: {error}") from error
