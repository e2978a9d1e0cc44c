"""Read stored tensors by range: a part of a checkpoint, or a plain model folder in Hugging Face's layout."""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from .exchange import Range
from .fetch import Fetcher, Share
from .fragments import FragmentReader, TensorSpec
from .layout import DTYPES, StoredFile, StoredTensor, num_elements, open_folder
from .manifest import Span, read_checked

T = TypeVar("T")

READ_BYTES = 16 * 2**20
"""Bytes of one ranged read; a larger range comes as several, side by side."""

READS_AT_ONCE = 4

STRETCH = 32
"""Reads of one tensor that ranks of a node share out among them before any goes on: 512 MiB."""

SMALL_BYTES = 2**20
"""Neighbouring tensors up to this size are fetched together, up to `READ_BYTES`: an adapter has hundreds of them, and
an object store answers each request in some 20 ms."""


class Memory:
    """Host memory for what is read, used again once nobody holds a tensor in it any more: the system takes longer to
    give fresh pages than to copy into them from its cache, and an engine drops a tensor before it reads the next."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._references = sys.getrefcount(self._buffer)  # while no tensor lies in it
        self._taking = threading.Lock()

    def take(self, size: int) -> torch.Tensor:
        """A tensor of `size` bytes, of any content."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        with self._taking:
            if len(self._buffer) < size or sys.getrefcount(self._buffer) > self._references:
                self._buffer = bytearray()  # the old one goes before the new one comes
                self._buffer = bytearray(size)
            return torch.frombuffer(self._buffer, dtype=torch.uint8, count=size)


class CheckpointReader:
    """A `FragmentReader` of part `stem` in folder `url`. Opening reads the headers of all files, and nothing else.

    With `spans` (of files, by name) all that is read is held against their checksums. What is not as it was written
    is named in `damaged`, and read all the same: an engine may need all ranks for what it does with a tensor. `share`:
    what several ranks of the node read is fetched by one of them. `memory`: that readers which take turns share.
    Threads may share it. Raises UserError when the folder has no such safetensors files, or broken ones, and
    DamagedError for headers that are not what was written.
    """

    def __init__(
        self,
        url: str,
        stem: str = "model",
        spans: Mapping[str, Sequence[Span]] | None = None,
        share: Share | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.url = url
        self._fetcher = Fetcher(url, spans or {}, share)
        self._check_headers(stem)
        self.files = open_folder(url, stem)
        self._memory = memory or Memory()
        self._kept = _Block("", 0, b"")
        self._keeping = threading.Lock()
        self._small: dict[str, list[Range]] = {}

    @property
    def damaged(self) -> list[str]:
        """What was read and is not what was written."""
        return self._fetcher.damaged

    def names(self) -> Sequence[str]:
        """Names of the stored tensors, in file order."""
        return list(self.files.places)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a stored tensor. Raises KeyError."""
        return self.files.places[name][1].spec

    def read(self, name: str, ranges: Sequence[Range]) -> torch.Tensor:
        """The elements of these ranges, one after the other, as a flat host tensor in the stored dtype."""
        file, place = self.files.places[name]
        dtype = DTYPES[place.spec.dtype]
        count = sum(stop - start for start, stop in ranges)
        data = self._memory.take(count * dtype.itemsize)
        target = data.numpy().data
        reads = _reads(place, ranges, dtype.itemsize)
        if place.stop - place.start <= SMALL_BYTES:
            block = self._block_of(file, place) if reads else self._kept
            for at, start, stop in reads:
                target[at : at + stop - start] = block.data[start - block.start : stop - block.start]
        else:
            self._fill(target, file.name, reads, by_all=count == num_elements(place.spec))
        return data.view(getattr(torch, dtype.torch_name))

    def _fill(self, target: memoryview, name: str, reads: list[tuple[int, int, int]], *, by_all: bool) -> None:
        def fill(at: int, start: int, stop: int) -> None:
            self._fetcher.read_into(name, start, target[at : at + stop - start], by_all=by_all)

        if len(reads) < 2:
            for read in reads:
                fill(*read)
            return
        if by_all and self._fetcher.share is not None:
            reads = _in_turn(reads, self._fetcher.share.turn)
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            list(pool.map(fill, *zip(*reads, strict=True)))

    def _block_of(self, file: StoredFile, place: StoredTensor) -> _Block:
        """The block of small neighbours that a tensor lies in. All ranks cut a file alike: each needs all of it."""
        with self._keeping:
            kept = self._kept
            if kept.file != file.name or not kept.start <= place.start <= place.stop <= kept.stop:
                if file.name not in self._small:
                    self._small[file.name] = list(_small_blocks(file))
                blocks = self._small[file.name]
                start, stop = blocks[bisect_right(blocks, place.start, key=lambda block: block[0]) - 1]
                data = bytearray(stop - start)
                self._fetcher.read_into(file.name, start, memoryview(data), by_all=True)
                self._kept = kept = _Block(file.name, start, data)
            return kept

    def _check_headers(self, stem: str) -> None:
        spans = self._fetcher.spans
        names = [name for name in spans if name.startswith((f"{stem}.", f"{stem}-")) and spans[name]]
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            list(pool.map(self._check_header, names))

    def _check_header(self, name: str) -> None:
        spans = self._fetcher.spans[name]
        read_checked(self.url, name, spans, 0, spans[0].length)


def read_whole(reader: FragmentReader, name: str) -> torch.Tensor:
    """A whole tensor in its shape."""
    spec = reader.spec(name)
    return reader.read(name, [(0, num_elements(spec))]).reshape(spec.shape)


class _Block(NamedTuple):
    """Bytes of a file from `start` on."""

    file: str
    start: int
    data: bytearray | bytes

    @property
    def stop(self) -> int:
        return self.start + len(self.data)


def _small_blocks(file: StoredFile) -> Iterator[Range]:
    """Runs of neighbouring small tensors, as byte ranges, each up to `READ_BYTES`."""
    start = stop = 0
    for tensor in file.tensors:
        is_small = tensor.stop - tensor.start <= SMALL_BYTES
        if stop > start and not (is_small and tensor.stop - start <= READ_BYTES):
            yield start, stop
            start = stop
        if is_small:
            start, stop = (start if stop > start else tensor.start), tensor.stop
    if stop > start:
        yield start, stop


def _in_turn(reads: Sequence[tuple[int, int, int]], turn: float) -> list[tuple[int, int, int]]:
    """The same reads, each stretch of them begun at another place by each rank, so that they fetch for each other."""
    stretches = [reads[first : first + STRETCH] for first in range(0, len(reads), STRETCH)]
    return [read for stretch in stretches for read in rotated(stretch, int(turn * len(stretch)))]


def rotated(items: Sequence[T], by: int) -> Sequence[T]:
    """Begun at the item `by`."""
    return [*items[by:], *items[:by]]


def _reads(place: StoredTensor, ranges: Sequence[Range], itemsize: int) -> list[tuple[int, int, int]]:
    """(place in the result, first byte, end) of each ranged read; ranges that touch are read as one. They are cut on a
    grid that begins with the tensor, as its spans do."""
    joined: list[Range] = []
    for start, stop in ranges:
        if not 0 <= start <= stop <= num_elements(place.spec):
            raise ValueError(f"elements {start} to {stop} are not in {place.spec.name} of shape {place.spec.shape}")
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    reads, target = [], 0
    for start, stop in joined:
        first, end = place.start + start * itemsize, place.start + stop * itemsize
        while first < end:
            last = min(end, first + READ_BYTES - (first - place.start) % READ_BYTES)
            reads.append((target, first, last))
            target, first = target + last - first, last
    return reads
