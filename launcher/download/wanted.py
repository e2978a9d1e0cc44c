"""What of a recipe lies elsewhere, and where it goes below a folder. Pure, but for listing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ...distributed.data.hub import is_pinned
from ...distributed.data.sources import find_files
from ...distributed.storage import NO_OPTIONS, FileInfo
from ...recipes.schema import EvalSplit, Recipe, Source

OUTSIDE = ("hf://", "http://", "https://")
"""URLs of the internet. Object stores are most often in reach of nodes; they are fetched when that is asked for."""

STRANGE = re.compile(r"[^A-Za-z0-9._=@+-]")


@dataclass(frozen=True)
class WantedFile:
    """A file and its place below the folder. `options`: storage options that it is read with."""

    url: str
    size: int
    etag: str
    place: str
    options: str = NO_OPTIONS


@dataclass(frozen=True)
class WantedSource:
    """A source of rows and its files, in their order. `key`: `data.train.0`."""

    key: str
    files: tuple[WantedFile, ...]


def is_outside(path: str, *, everything: bool) -> bool:
    """Whether a path of data is to be fetched."""
    if is_pinned(path) or path.startswith(OUTSIDE):
        return True
    return everything and "://" in path and not path.startswith("file://")


def sources_of(recipe: Recipe) -> list[tuple[str, Source]]:
    """(key, source) of all that rows are read from."""
    held_out: Sequence[Source] = () if isinstance(recipe.data.eval, EvalSplit) else recipe.data.eval
    parts = (("train", recipe.data.train), ("eval", held_out))
    return [(f"data.{part}.{number}", source) for part, sources in parts for number, source in enumerate(sources)]


def wanted_sources(
    recipe: Recipe, *, everything: bool, find: Callable[[Source, str], list[FileInfo]] = find_files
) -> list[WantedSource]:
    """Sources of which a path lies outside; all of their files then come along, so that a source stays in one place.
    Raises UserError for one that holds nothing."""
    return [
        WantedSource(key, tuple(_wanted(file) for file in find(source, key)))
        for key, source in sources_of(recipe)
        if any(is_outside(path, everything=everything) for path in source.paths)
    ]


def _wanted(file: FileInfo) -> WantedFile:
    return WantedFile(file.url, file.size, file.etag, place_of(file.url), file.options)


def place_of(url: str) -> str:
    """`s3://acme/a/b.parquet` -> `data/s3/acme/a/b.parquet`: no two URLs share a place, and none is outside of it."""
    scheme, separator, rest = url.partition("://")
    rest, _, query = (rest if separator else url).partition("?")
    parts = [part for part in PurePosixPath(rest).parts if part != "/"]
    plain = [STRANGE.sub("_", part) for part in parts]
    if query or plain != parts or ".." in parts:
        digest = hashlib.blake2b(url.encode(), digest_size=4).hexdigest()
        plain = [digest, *(part for part in plain if part != "..")]
    return "/".join(["data", STRANGE.sub("_", scheme) if separator else "here", *plain])


def model_place(path: str, commit: str) -> str:
    """`acme/tiny` at a commit -> `models/acme--tiny@COMMIT`."""
    return f"models/{STRANGE.sub('_', path.replace('/', '--'))}@{STRANGE.sub('_', commit)}"
