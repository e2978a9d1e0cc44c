"""A source's files: what a path of the recipe means, and what is near it when it means nothing."""

from __future__ import annotations

import difflib
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ...recipes.errors import KeyedError
from ...recipes.formats import standard_columns
from ...recipes.schema import RowFormat, Source
from .. import storage
from ..storage import NO_OPTIONS, FileInfo
from .at_once import in_parallel
from .formats import SUFFIXES, kind_of, of_first_tier
from .hub import HUB, hub_files, is_hub, is_pinned

MANY_NAMES = 8

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class SourceInfo(NamedTuple):
    """A source as the stream needs it: its rows' format, and standard -> file column names."""

    name: str
    format: RowFormat
    columns: dict[str, str]
    options: str = NO_OPTIONS
    """Storage options that its files are read with."""

    @property
    def named_columns(self) -> tuple[tuple[str, str], ...]:
        """Standard names of the columns that are read, and their names in the files."""
        return tuple((column, self.columns.get(column, column)) for column in standard_columns(self.format))

    @property
    def file_columns(self) -> tuple[str, ...]:
        """The file's columns that are read."""
        return tuple(name for _, name in self.named_columns)


def find_files(source: Source, key: str) -> list[FileInfo]:
    """The files that a source's path means, in order. `key`: the source's place in the recipe, for errors; "": none.

    Raises UserError: nothing there, a file of no known kind, a file that is meant twice."""
    options = storage.options_text(source.storage_options)
    where = f"{key}.path" if key else ""
    files = []
    for path in source.paths:
        there = _path_files(source, path, options)
        if not there:
            raise KeyedError(f"{path}: no data files found. {_near(path, options)}{_hub_hint(path)}", where)
        files += there
    for file in files:
        if kind_of(file.url) is None:
            known = ", ".join(SUFFIXES)
            raise KeyedError(f"{file.url}: not a known kind of data file. Known: {known}.", where)
    _must_differ(files, where)
    return files


def list_now(source: Source) -> list[FileInfo]:
    """What `find_files` would find; fewer files, or none, where some are gone. Files of a commit cannot change and are
    not asked for."""
    options = storage.options_text(source.storage_options)
    paths = [path for path in source.paths if not is_pinned(path)]
    return [file for path in paths for file in _path_files(source, path, options)]


def _path_files(source: Source, path: str, options: str) -> list[FileInfo]:
    if is_hub(path):
        urls = hub_files(path, source.subset, source.split)
        return in_parallel(lambda url: storage.info(url, options=options), urls)
    listed = storage.list_files(path, tuple(SUFFIXES), options=options)
    is_pattern = any(character in path for character in "*?[")
    return listed if is_pattern or len(listed) == 1 else of_first_tier(listed)


def _must_differ(files: Sequence[FileInfo], where: str) -> None:
    """A row that comes twice must be meant to."""
    twice = [url for url, count in Counter(file.url for file in files).items() if count > 1]
    if twice:
        raise KeyedError(
            f"{twice[0]} is meant by two of the paths, so its rows would be read twice. Name every file once; to serve "
            "a source more than once an epoch, see weight and num_epochs.",
            where,
        )


def _hub_hint(path: str) -> str:
    is_name = HUB_NAME.fullmatch(path) is not None and kind_of(path) is None
    return f" If a data set of the Hugging Face hub is meant, write {HUB}{path}." if is_name else ""


def _near(path: str, options: str) -> str:
    """What there is on the way to a path, in words."""
    scheme, separator, place = path.rpartition("://")
    place = place.rstrip("/")
    missed = ""
    while place and not storage.is_folder(scheme + separator + place, options=options):
        place, missed = posixpath.split(place)
    if separator and not place:
        return "No part of that path exists, the bucket neither."
    folder = scheme + separator + (place or ".")
    names = storage.list_names(folder, options=options)
    return f"{_meant(missed, names)}Nearest folder: {folder}, which holds {_listed(names)}."


def _meant(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"Did you mean {close[0]}? " if close else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MANY_NAMES} more" if len(names) > MANY_NAMES else ""
    return ", ".join(names[:MANY_NAMES]) + more or f"nothing; data files end in {', '.join(SUFFIXES)}"
