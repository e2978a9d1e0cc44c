"""Bytes of the files of one folder: held against their checksums where these are known, and fetched once where several
ranks of a node want the same."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from .. import storage
from .manifest import Span


class Share(Protocol):
    """What the ranks of a node fetch for each other. `turn`: this rank's place among them, 0 to 1."""

    turn: float

    def read(self, what: str, fetch: Callable[[], bytearray]) -> memoryview:
        """The bytes that are called `what`: as another rank has fetched them, or fetched now."""
        ...


class _Cut(NamedTuple):
    """Bytes [start, stop), within these spans. `is_whole`: they are all of them."""

    start: int
    stop: int
    spans: Sequence[Span]
    is_whole: bool


@dataclass
class Fetcher:
    """Reads ranges of files into memory. `spans`: of files, by name; what differs from them twice (a single read may
    have gone wrong on the way) is named in `damaged`, and read all the same."""

    url: str
    spans: Mapping[str, Sequence[Span]]
    share: Share | None = None
    damaged: list[str] = field(default_factory=list)

    def read_into(self, name: str, start: int, target: memoryview, *, by_all: bool) -> None:
        """Bytes from `start` on of a file. `by_all`: every rank of the node asks for these very bytes; of others the
        spans at the ends may be wanted by two."""
        if self.share is not None and by_all:
            what = f"{self.url}/{name} {start} {len(target)}"
            target[:] = self.share.read(what, lambda: self._fetched(name, start, len(target)))
        else:
            self._read(name, start, target)

    def _fetched(self, name: str, start: int, length: int) -> bytearray:
        data = bytearray(length)
        self._read(name, start, memoryview(data))
        return data

    def _read(self, name: str, start: int, target: memoryview) -> None:
        spans = self.spans.get(name)
        if not spans:
            storage.read_into(storage.join(self.url, name), start, target)
            return
        for cut in _cuts(spans, start, start + len(target)):
            part = target[cut.start - start : cut.stop - start]
            if cut.is_whole:
                self._read_spans(name, cut.spans, part)
            else:
                part[:] = self._within(name, cut)

    def _within(self, name: str, cut: _Cut) -> memoryview:
        """A part of one span, which is read whole: its checksum needs it, and so may the rank that holds the rest."""
        [span] = cut.spans

        def fetch() -> bytearray:
            data = bytearray(span.length)
            self._read_spans(name, [span], memoryview(data))
            return data

        share = self.share
        data = share.read(f"{self.url}/{name} span {span.offset}", fetch) if share else memoryview(fetch())
        return data[cut.start - span.offset : cut.stop - span.offset]

    def _read_spans(self, name: str, spans: Sequence[Span], target: memoryview) -> None:
        url, begin = storage.join(self.url, name), spans[0].offset
        wrong = spans
        for _ in range(2):
            storage.read_into(url, begin, target)
            wrong = [s for s in spans if zlib.crc32(target[s.offset - begin :][: s.length]) != s.crc32]
            if not wrong:
                return
        first = wrong[0]
        self.damaged.append(f"{url}: bytes {first.offset} to {first.offset + first.length} are not what was written")


def _cuts(spans: Sequence[Span], start: int, stop: int) -> Iterator[_Cut]:
    """[start, stop), cut where it begins or ends within a span."""
    first = bisect_right(spans, start, key=lambda span: span.offset) - 1
    touched = [span for span in spans[first:] if span.offset < stop]
    inside = [span for span in touched if start <= span.offset and span.offset + span.length <= stop]
    for span in touched if not inside else touched[: touched.index(inside[0])]:
        yield _Cut(max(start, span.offset), min(stop, span.offset + span.length), [span], False)
    if inside:
        yield _Cut(inside[0].offset, inside[-1].offset + inside[-1].length, inside, True)
        for span in touched[touched.index(inside[-1]) + 1 :]:
            yield _Cut(span.offset, stop, [span], False)
