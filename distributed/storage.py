"""Every byte to or from anywhere: plain paths and fsspec URLs, with retries and errors that say what to do.

Functions take a URL (a plain path, or `s3://`, `gs://`, `http://`, `memory://` ...), or a `FileInfo` that a listing
gave. Errors that the user can mend (not found, access denied, a missing package) are `UserError`s that name the URL;
trouble that passes (5xx, "slow down", resets, time-outs, short reads) is retried with full-jitter backoff and only then
an `InfrastructureError`. Credentials come from the environment, as the store's client reads them; endpoints and the
like from the environment too, or from a source's `storage_options`.
"""

from __future__ import annotations

from .storage_in_place import RangeFile, make_file
from .storage_list import exists, info, is_folder, list_files, list_names
from .storage_log import REWRITE_EVERY_S, LineLog, complete_lines
from .storage_parts import PartMark, PartUploads, part_bytes, takes_parts
from .storage_place import NO_OPTIONS, FileInfo, filesystem, is_local, join, local_path, options_text
from .storage_read import read_bytes, read_file, read_into, read_range
from .storage_retry import RETRY, RetryPolicy, ShortReadError, retrying
from .storage_throttle import request_counts
from .storage_write import (
    WRITE_BLOCK_BYTES,
    check_writable,
    create_exclusive,
    delete_tree,
    link,
    open_write,
    sync_folder,
    write_bytes,
)

__all__ = [
    "NO_OPTIONS",
    "RETRY",
    "REWRITE_EVERY_S",
    "WRITE_BLOCK_BYTES",
    "FileInfo",
    "LineLog",
    "PartMark",
    "PartUploads",
    "RangeFile",
    "RetryPolicy",
    "ShortReadError",
    "check_writable",
    "complete_lines",
    "create_exclusive",
    "delete_tree",
    "exists",
    "filesystem",
    "info",
    "is_folder",
    "is_local",
    "join",
    "link",
    "list_files",
    "list_names",
    "local_path",
    "make_file",
    "open_write",
    "options_text",
    "part_bytes",
    "read_bytes",
    "read_file",
    "read_into",
    "read_range",
    "request_counts",
    "retrying",
    "sync_folder",
    "takes_parts",
    "write_bytes",
]
