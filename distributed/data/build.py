"""Building an index: find the files, scan them at once, settle every source's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ...recipes.errors import UserError
from ...recipes.schema import Source
from ..storage import FileInfo
from . import jsonl, lines
from .at_once import in_parallel
from .block import ALL_ROWS
from .formats import FORMATS, FileFormat, kind_of
from .index import Index
from .memory import allowance
from .order import Int64s
from .schemas import Scanned, settle
from .selection import rows_wanted
from .sources import SourceInfo, find_files

LARGEST_RATIO = 64
"""Text is seldom compressed better than this."""


def build_index(
    sources: Sequence[Source],
    names: Sequence[str],
    *,
    keys: Sequence[str] = (),
    block_bytes: int = lines.BLOCK_BYTES,
    known: Index | None = None,
) -> Index:
    """Find the sources' files and cut them into blocks. `names`: what the sources are called in reports; `keys`:
    where they stand in the recipe, for errors; `known`: an earlier index, whose unchanged files are not scanned
    again.

    Raises UserError: nothing found, an unknown kind of file, an empty file, a missing column, no rows at all.
    """
    found = [find_files(*one) for one in zip(sources, keys or [""] * len(sources), strict=True)]
    scan = _Scanner(block_bytes, known)
    scanned = [in_parallel(partial(scan, first=group[0]), group) for group in found]
    infos = tuple(settle(*one) for one in zip(sources, names, scanned, strict=True))
    return _select_rows(_assemble(infos, scanned), sources)


class _Scanner:
    """Scans a file, unless an earlier index knows it. The first file of a source shows the columns that others are held
    against, so it is always looked at."""

    def __init__(self, block_bytes: int, known: Index | None) -> None:
        jsonl_scan = partial(jsonl.scan, block_bytes=block_bytes)
        self._formats: dict[str, FileFormat] = {**FORMATS, "jsonl": FORMATS["jsonl"]._replace(scan=jsonl_scan)}
        self._known = known
        self._places = {file: number for number, file in enumerate(known.files)} if known else {}

    def __call__(self, file: FileInfo, *, first: FileInfo) -> Scanned:
        kind = kind_of(file.url)
        assert kind is not None, "find_files lets no other through"
        if self._known is not None and file in self._places and file != first:
            return Scanned(file, kind, self._known.scan_of(self._places[file]))
        if file.size == 0:
            raise UserError(f"{file.url}: the file is empty (0 bytes). Remove it, or write it again.")
        return Scanned(file, kind, self._formats[kind].scan(file))


def _assemble(infos: tuple[SourceInfo, ...], scanned: Sequence[Sequence[Scanned]]) -> Index:
    every = [one for group in scanned for one in group]
    blocks = [len(one.scan.starts) for one in every]
    return Index(
        infos,
        tuple(one.file for one in every),
        tuple(one.kind for one in every),
        np.repeat(np.arange(len(scanned)), [len(group) for group in scanned]),
        np.repeat(np.arange(len(every)), blocks),
        np.concatenate([one.scan.starts for one in every]),
        np.concatenate([one.scan.nbytes for one in every]),
        np.concatenate([one.scan.rows for one in every]),
        np.zeros(sum(blocks), np.int64),
        np.full(sum(blocks), ALL_ROWS),
    )


def require_to_fit(index: Index) -> None:
    """Refuse at once what reading would refuse hours later: blocks that do not fit into this machine's memory. Only
    those are looked at that could be so large. Raises UserError."""
    large = np.flatnonzero(index.block_bytes > allowance() // LARGEST_RATIO).tolist()
    checks = [(FORMATS[index.kind(block)].require_to_fit, index.address(block)) for block in large]
    in_parallel(lambda one: one[0] and one[0](one[1]), checks)


def _select_rows(index: Index, sources: Sequence[Source]) -> Index:
    """Settle which rows are used where a source says `skip` or `take`. Raises UserError when none is left."""
    rows, skip, take = index.block_rows.copy(), index.block_skip.copy(), index.block_take.copy()
    for number, source in enumerate(sources):
        if source.skip or source.take is not None:
            blocks = np.flatnonzero(index.block_source == number)
            count = partial(_count_rows, index, blocks)
            wanted = rows_wanted(rows[blocks], count, source.skip, source.take)
            rows[blocks], skip[blocks], take[blocks] = wanted
            if not np.where(wanted.take == ALL_ROWS, wanted.rows, wanted.take).any():
                name, there = index.sources[number].name, int(wanted.rows.sum())
                raise UserError(f"source {name}: skip {source.skip} leaves nothing of its {there} rows")
    return replace(index, block_rows=rows, block_skip=skip, block_take=take)


def _count_rows(index: Index, blocks: Int64s, places: Sequence[int]) -> list[int]:
    return in_parallel(lambda place: index.read_block(int(blocks[place])).num_rows, places)
