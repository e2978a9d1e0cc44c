"""Everything that can be said about a checkpoint's bytes, all of which are read once: what is damaged or missing,
whether the files agree with their index, and whether the weights are finite numbers."""

from __future__ import annotations

import json
import re
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ...recipes.errors import UserError
from .. import storage
from .layout import DTYPES, StoredFile, num_bytes, open_folder, read_header
from .manifest import MANIFEST_NAME, TRAINING, FileRecord, Manifest, Span, neighbours

READS_AT_ONCE = 4
"""Each holds 16 MiB, and as much again while numbers are looked at."""

FLOATS = frozenset({"F64", "F32", "BF16", "F16"})

WEIGHTS = re.compile(r"(?:training/)?([^/]+?)(?:-\d{5}-of-\d{5})?\.safetensors")

Advance = Callable[[int], None]
"""Takes the bytes that were read since it was last called."""


class Damage(NamedTuple):
    """Bytes [start, stop) of a file, and what is wrong with them."""

    path: str
    start: int
    stop: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}: bytes {self.start} to {self.stop} {self.what}"


@dataclass(frozen=True)
class Findings:
    """What was found. `headers`: where headers and indexes contradict each other; `not_finite`: tensor -> how many of
    its values are NaN or infinite; `unlisted`: files that no manifest names, which do no harm; `tensors` those of the
    weights, `weight_files` the files that hold them."""

    files: int
    num_bytes: int
    spans: int
    missing: tuple[str, ...]
    damaged: tuple[Damage, ...]
    headers: tuple[str, ...]
    not_finite: dict[str, int]
    unlisted: tuple[str, ...]
    tensors: int
    weight_files: int

    @property
    def is_whole(self) -> bool:
        """Whether all is there as it was written."""
        return not (self.missing or self.damaged or self.headers)


class _Look(NamedTuple):
    """What one read found."""

    damaged: list[Damage]
    not_finite: Counter[str]


def examine(directory: str, manifest: Manifest, advance: Advance) -> Findings:
    """Read all of it. Raises InfrastructureError for storage that cannot be read at all."""
    there = _listed(directory, manifest)
    missing = tuple(file.path for file in manifest.files if file.path not in there)
    files = [file for file in manifest.files if file.path in there]
    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="verify") as pool:
        headers = dict(zip([f.path for f in files], pool.map(partial(_header, directory), files), strict=True))
        reads = [partial(_unexpected_size, directory, file) for file in files]
        reads += [
            partial(_look, directory, file, spans, headers[file.path], advance)
            for file in files
            for spans in neighbours(file.spans)
        ]
        looks = list(pool.map(lambda read: read(), reads))
    damaged = _joined(sorted(damage for look in looks for damage in look.damaged))
    broken = {*missing, *(damage.path for damage in damaged)}
    problems, tensors, weight_files = _layout(directory, manifest, broken)
    return Findings(
        files=len(manifest.files),
        num_bytes=sum(file.size for file in manifest.files),
        spans=sum(len(file.spans) for file in manifest.files),
        missing=missing,
        damaged=tuple(damaged),
        headers=tuple(problems),
        not_finite=dict(sum((look.not_finite for look in looks), Counter())),
        unlisted=tuple(sorted(there - {file.path for file in manifest.files} - {MANIFEST_NAME, TRAINING.strip("/")})),
        tensors=tensors,
        weight_files=weight_files,
    )


def _listed(directory: str, manifest: Manifest) -> set[str]:
    """Paths of what lies in the folders that the manifest names."""
    folders = {file.path.rpartition("/")[0] for file in manifest.files} | {""}
    names = {folder: storage.list_names(_folder(directory, folder)) for folder in folders}
    return {f"{folder}/{name}".strip("/") for folder, inside in names.items() for name in inside}


def _folder(directory: str, below: str) -> str:
    return storage.join(directory, below) if below else directory


def _header(directory: str, file: FileRecord) -> StoredFile | None:
    """Of a file that holds weights; None for others, and where it cannot be read, which the checksums say better."""
    if not file.path.endswith(".safetensors") or file.path.startswith(TRAINING):
        return None
    try:
        return read_header(storage.join(directory, file.path), file.path)
    except UserError:
        return None


def _unexpected_size(directory: str, file: FileRecord) -> _Look:
    """Bytes that were cut off, added, or that no checksum covers."""
    size = storage.info(storage.join(directory, file.path)).size
    covered = sum(span.length for span in file.spans)
    damaged = []
    if size < file.size:
        damaged.append(Damage(file.path, size, file.size, f"are cut off ({file.size} bytes were written)"))
    if size > file.size:
        damaged.append(Damage(file.path, file.size, size, f"were added ({file.size} bytes were written)"))
    if covered != file.size:
        damaged.append(Damage(file.path, covered, file.size, "are covered by no checksum"))
    return _Look(damaged, Counter())


def _look(
    directory: str, file: FileRecord, spans: Sequence[Span], header: StoredFile | None, advance: Advance
) -> _Look:
    """Neighbouring spans, read at once; what differs is read a second time: a read may go wrong on the way."""
    url = storage.join(directory, file.path)
    start, stop = spans[0].offset, min(spans[-1].offset + spans[-1].length, storage.info(url).size)
    data = memoryview(storage.read_range(url, start, stop))
    wrong = [span for span in spans if not _is_as_written(data, start, span)]
    if wrong:
        data = memoryview(storage.read_range(url, start, stop))
        wrong = [span for span in wrong if not _is_as_written(data, start, span)]
    advance(sum(span.length for span in spans))
    there = [span for span in wrong if span.offset < stop]  # what is cut off is said by itself
    damaged = [
        Damage(file.path, span.offset, min(stop, span.offset + span.length), "are not what was written")
        for span in there
    ]
    return _Look(damaged, _not_finite(url, header, start, data) if header else Counter())


def _is_as_written(data: memoryview, start: int, span: Span) -> bool:
    part = data[span.offset - start :][: span.length]
    return len(part) == span.length and zlib.crc32(part) == span.crc32


def _not_finite(url: str, file: StoredFile, start: int, data: memoryview) -> Counter[str]:
    """How many values that end within these bytes are no finite numbers, by tensor."""
    found: Counter[str] = Counter()
    first = max(0, bisect_right(file.tensors, start, key=lambda tensor: tensor.start) - 1)
    stop = start + len(data)
    for tensor in file.tensors[first:]:
        if tensor.start >= stop:
            break
        size, kind = DTYPES[tensor.spec.dtype].itemsize, tensor.spec.dtype
        low, high = max(start, tensor.start), min(stop, tensor.stop)
        if kind not in FLOATS or low >= high:
            continue
        head = -(low - tensor.start) % size
        values = bytearray(data[low + head - start : high - start - (high - tensor.start) % size])
        if head:  # a value across two reads
            values += storage.read_range(url, low + head - size, low + head)
        if values:
            numbers = torch.frombuffer(values, dtype=getattr(torch, DTYPES[kind].torch_name))
            found[tensor.spec.name] += int((~numbers.isfinite()).sum())
    return +found


def _joined(damages: Iterable[Damage]) -> list[Damage]:
    """Neighbouring ranges as one."""
    joined: list[Damage] = []
    for damage in damages:
        if joined and (joined[-1].path, joined[-1].stop, joined[-1].what) == (damage.path, damage.start, damage.what):
            joined[-1] = joined[-1]._replace(stop=damage.stop)
        else:
            joined.append(damage)
    return joined


# --- headers and indexes --------------------------------------------------------------------------------------------


def _layout(directory: str, manifest: Manifest, broken: set[str]) -> tuple[list[str], int, int]:
    """(contradictions, tensors and files of the weights), of the parts none of whose files is broken."""
    problems: list[str] = []
    tensors = weight_files = 0
    paths = [file.path for file in manifest.files]
    parts = {
        (TRAINING if path.startswith(TRAINING) else "", match[1])
        for path in paths
        if (match := WEIGHTS.fullmatch(path))
    }
    for folder, stem in sorted(parts):
        if any(path.startswith((f"{folder}{stem}.", f"{folder}{stem}-")) for path in broken):
            continue
        try:
            files = open_folder(_folder(directory, folder), stem)
        except UserError as error:
            problems.append(str(error))
            continue
        index = f"{folder}{files.index_name}"
        problems += (
            _index_problems(directory, index, files.files) if index in paths else _without_index(index, files.files)
        )
        if not folder:
            tensors, weight_files = tensors + len(files.places), weight_files + len(files.files)
    return problems, tensors, weight_files


def _without_index(index: str, files: Sequence[StoredFile]) -> list[str]:
    return [f"{index} is missing for {len(files)} files"] if len(files) > 1 else []


def _index_problems(directory: str, index: str, files: Sequence[StoredFile]) -> Iterator[str]:
    held = {tensor.spec.name: file.name for file in files for tensor in file.tensors}
    total = sum(num_bytes(tensor.spec) for file in files for tensor in file.tensors)
    content = json.loads(storage.read_bytes(storage.join(directory, index)))
    named = content["weight_map"]
    if named != held:
        differing = sorted(name for name in named.keys() | held.keys() if named.get(name) != held.get(name))
        yield f"{index} and the headers of its files disagree about {', '.join(differing[:3])}"
    if content.get("metadata", {}).get("total_size") != total:
        yield f"{index} says {content.get('metadata', {}).get('total_size')} bytes, the headers {total}"
