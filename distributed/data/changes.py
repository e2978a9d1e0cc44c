"""What became of the files of an index since it was built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...recipes.schema import Source
from ..storage import FileInfo
from .at_once import in_parallel
from .hub import is_pinned
from .index import Index
from .sources import list_now

NAMED = 10


@dataclass(frozen=True)
class Changes:
    """Files by URL that are no longer what they were, that are gone, and that are new."""

    changed: tuple[str, ...]
    vanished: tuple[str, ...]
    added: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.changed or self.vanished or self.added)

    def __str__(self) -> str:
        return "\n".join([*self.changed, *self.vanished, *self.added][:NAMED] + self._more())

    def _more(self) -> list[str]:
        count = len(self.changed) + len(self.vanished) + len(self.added)
        return [f"... and {count - NAMED} more"] if count > NAMED else []


def find_changes(index: Index, sources: Sequence[Source]) -> Changes:
    """List the sources' files again and compare."""
    now = {_place(file): file for group in in_parallel(list_now, sources) for file in group}
    compared = [not all(map(is_pinned, source.paths)) for source in sources]
    before = {
        _place(file): file
        for file, source in zip(index.files, index.file_source.tolist(), strict=True)
        if compared[source]
    }
    changed = [_said(before[at], now[at]) for at in before.keys() & now.keys() if before[at] != now[at]]
    return Changes(
        tuple(sorted(changed)),
        tuple(f"{url}: not found any more" for url, _ in sorted(before.keys() - now.keys())),
        tuple(f"{url}: new since the run began" for url, _ in sorted(now.keys() - before.keys())),
    )


def _place(file: FileInfo) -> tuple[str, str]:
    """Two stores may have a file of one URL."""
    return file.url, file.options


def _said(was: FileInfo, now: FileInfo) -> str:
    how = "grew" if now.size > was.size else "shrank" if now.size < was.size else "changed"
    return f"{was.url}: {how} since the run began (was {was.size} bytes, {was.etag}; is {now.size}, {now.etag})"
