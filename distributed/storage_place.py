"""Where bytes lie: plain paths and fsspec URLs, and the file systems behind them."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..recipes.errors import UserError
from .storage_errors import definite_error, protocol
from .storage_s3 import CLIENT_CONFIG, quicken

NO_OPTIONS = "{}"

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30
"""Without a byte for this long an answer is given up, and asked for again."""

CONNECTIONS = 64
"""Connections kept to one store; above what readers ask for at once."""

EXTRA_OPTIONS: dict[str, frozenset[str]] = {
    "s3": frozenset({"profile"}),  # goes to botocore's session
    "http": frozenset({"headers", "proxy", "ssl"}),  # go with every request
    "gs": frozenset(),
    "az": frozenset(),
}
"""Protocols whose option names are known, with those that are not in fsspec's signatures."""

SAME_AS = {"s3a": "s3", "https": "http", "gcs": "gs", "abfs": "az", "abfss": "az"}


@dataclass(frozen=True)
class FileInfo:
    """A stored file. `etag` changes when the content does: the store's ETag, or mtime and size where it has none.
    `options` are fsspec's storage options that it is read with, see `options_text`; they hold no secrets."""

    url: str
    size: int
    etag: str
    options: str = NO_OPTIONS


def options_text(options: Mapping[str, Any]) -> str:
    """Storage options as JSON: hashable, and one object for all files of a source."""
    return json.dumps(options, sort_keys=True) if options else NO_OPTIONS


def is_local(url: str) -> bool:
    """True for plain paths and file:// URLs."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(url.removeprefix("file://"))


def join(url: str, *parts: str) -> str:
    """The URL of something below `url`."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(url: str, options: str = NO_OPTIONS, *, uploads: bool = False) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path on it. Listings are never cached: other ranks write too.

    Trying again is done here, in `retrying`, and not by the store's client as well, which would multiply; but
    within a streamed upload (`uploads`) only the client can. Raises UserError for a protocol, package or option that
    is not there."""
    import fsspec

    if is_local(url):
        return fsspec.filesystem("file"), str(local_path(url).absolute())
    kind = SAME_AS.get(protocol(url), protocol(url))
    given = json.loads(options)
    try:
        if given:
            _check_options(kind, given, fsspec.get_filesystem_class(protocol(url)))
        defaults = {} if uploads else _client_defaults(kind)
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **_merged(defaults, given))
    except (ImportError, ValueError) as error:
        raise definite_error(url, error) or error from error
    if kind == "s3":
        quicken(fs)
        if not uploads:
            fs.retries = 1
    return fs, str(path)


def _client_defaults(kind: str) -> dict[str, Any]:
    """One try and bounded waiting."""
    if kind == "s3":
        config = {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": CONNECTIONS,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
        }
        return {"config_kwargs": config | CLIENT_CONFIG}
    if kind == "http":
        from aiohttp import ClientTimeout

        waits = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        return {"client_kwargs": {"timeout": waits}}
    return {}


def _merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`, section by section."""
    merged = {**defaults, **given}
    for key in defaults.keys() & given.keys():
        if isinstance(defaults[key], dict) and isinstance(given[key], dict):
            merged[key] = _merged(defaults[key], given[key])
    return merged


def _check_options(kind: str, given: Mapping[str, Any], cls: type) -> None:
    """fsspec hands unknown options on until somebody ignores them or fails without a word about their origin."""
    if kind not in EXTRA_OPTIONS:
        return
    known = _named_options(cls) | EXTRA_OPTIONS[kind]
    for key in given.keys() - known:
        close = difflib.get_close_matches(key, known, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"storage_options.{key}: {kind}:// knows no such option; {meant}It has: {_listed(known)}")


@cache
def _named_options(cls: type) -> frozenset[str]:
    signatures = [inspect.signature(vars(base)["__init__"]) for base in cls.__mro__ if "__init__" in vars(base)]
    parameters = [parameter for one in signatures for parameter in one.parameters.values()]
    return frozenset(parameter.name for parameter in parameters if _is_named(parameter)) - {"self"}


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names - {"loop", "asynchronous", "session", "get_client", "batch_size"}))
