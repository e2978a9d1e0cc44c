"""MANIFEST.json: what a checkpoint's directory holds, with a checksum per span of every file."""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...recipes.errors import UserError
from .. import storage

MANIFEST_NAME = "MANIFEST.json"
TRAINING = "training/"
"""What lies below this is needed to resume, and for nothing else."""

STATE_PATH = f"{TRAINING}state.json"

FORMAT = 1
"""Version of the manifest and of the directory's layout; a reader refuses a newer one."""


class DamagedError(UserError):
    """A file of a checkpoint is not what was written."""


class Span(NamedTuple):
    """Bytes [offset, offset + length) of a file and their CRC-32 (zlib's)."""

    offset: int
    length: int
    crc32: int


@dataclass(frozen=True)
class FileRecord:
    """A file, by its path in the checkpoint's directory. The spans are ascending and cover it whole."""

    path: str
    size: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Manifest:
    """All files of a checkpoint but the manifest itself."""

    step: int
    attempt: int
    files: tuple[FileRecord, ...]

    @property
    def is_resumable(self) -> bool:
        """Whether training can go on from it; else it holds its weights only."""
        return any(file.path == STATE_PATH for file in self.files)

    def weights_only(self) -> Manifest:
        """What is left without the training state."""
        return replace(self, files=tuple(file for file in self.files if not file.path.startswith(TRAINING)))

    def to_bytes(self) -> bytes:
        """As it is stored."""
        files = {file.path: {"size": file.size, "spans": file.spans} for file in self.files}
        content = {"format": FORMAT, "step": self.step, "attempt": self.attempt, "files": files}
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def record_bytes(path: str, data: bytes) -> FileRecord:
    """The record of a small file that was written at once."""
    spans = (Span(0, len(data), zlib.crc32(data)),) if data else ()
    return FileRecord(path, len(data), spans)


def read_manifest(directory: str) -> Manifest:
    """The manifest of a checkpoint's directory. Raises UserError if it is missing, broken, or of a newer format."""
    url = storage.join(directory, MANIFEST_NAME)
    if not storage.exists(url):
        raise UserError(f"{directory} is no checkpoint: it has no {MANIFEST_NAME}.")
    try:
        content = json.loads(storage.read_bytes(url))
        if content["format"] > FORMAT:
            raise UserError(
                f"{url} has format {content['format']}, this ftlaunch reads up to {FORMAT}: update ftlaunch."
            )
        files = tuple(
            FileRecord(path, file["size"], tuple(Span(*span) for span in file["spans"]))
            for path, file in content["files"].items()
        )
        return Manifest(content["step"], content["attempt"], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{url} is broken ({error!r}): use another checkpoint of the run.") from error


def read_checked(directory: str, path: str, spans: Sequence[Span], start: int, stop: int) -> memoryview | bytes:
    """Bytes [start, stop) of a file, read with the rest of the spans they lie in and held against their checksums.

    Raises DamagedError for what differs twice: a single read may have gone wrong on the way."""
    url = storage.join(directory, path)
    first = bisect_right(spans, start, key=lambda span: span.offset) - 1
    touched = [span for span in spans[first:] if span.offset < stop]
    if start == stop or not touched:
        return b""
    begin, end = touched[0].offset, touched[-1].offset + touched[-1].length
    for last in (False, True):
        data = memoryview(storage.read_range(url, begin, end))
        wrong = [span for span in touched if zlib.crc32(data[span.offset - begin :][: span.length]) != span.crc32]
        if not wrong:
            return data[start - begin : stop - begin]
        if last:
            raise DamagedError(f"{url}: bytes {wrong[0].offset} to {sum(wrong[0][:2])} are not what was written")
    raise AssertionError("the second read returns or raises")


def span_problems(directory: str, file: FileRecord, spans: tuple[Span, ...]) -> Iterator[str]:
    """Read `spans` of a file again and compare; neighbouring spans come in one ranged read each."""
    url = storage.join(directory, file.path)
    for run in neighbours(spans):
        start, stop = run[0].offset, run[-1].offset + run[-1].length
        data = memoryview(storage.read_range(url, start, stop))
        for span in run:
            found = zlib.crc32(data[span.offset - start : span.offset - start + span.length])
            if len(data) < span.offset - start + span.length or found != span.crc32:
                yield f"{url}: bytes {span.offset} to {span.offset + span.length} are not what was written"


def neighbours(spans: tuple[Span, ...], limit_bytes: int = 16 * 2**20) -> Iterator[list[Span]]:
    """Runs of spans that follow each other, each read at once."""
    run: list[Span] = []
    for span in spans:
        if run and (
            span.offset != run[-1].offset + run[-1].length or span.offset + span.length - run[0].offset > limit_bytes
        ):
            yield run
            run = []
        run.append(span)
    if run:
        yield run
