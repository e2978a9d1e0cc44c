"""Read stored tensors by range: a part of a checkpoint, or a plain model folder in Hugging Face's layout."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from .. import storage
from .exchange import Range
from .fragments import TensorSpec
from .layout import DTYPES, StoredFile, StoredTensor, num_elements, open_folder
from .manifest import DamagedError, Span, read_checked

READ_BYTES = 16 * 2**20
"""Bytes of one ranged read; a larger range comes as several, side by side."""

READS_AT_ONCE = 4

SMALL_BYTES = 2**20
"""Neighbouring tensors up to this size are fetched together, up to `READ_BYTES`: an adapter has hundreds of them, and
an object store answers each request in some 20 ms."""


class CheckpointReader:
    """A `FragmentReader` of part `stem` in folder `url`. Opening reads the headers of all files, and nothing else.

    With `spans` (of files, by name) all that is read is held against their checksums. What is not as it was written
    is named in `damaged`, and read all the same: an engine may need all ranks for what it does with a tensor.
    Raises UserError when the folder has no such safetensors files, or broken ones, and DamagedError for headers that
    are not what was written.
    """

    def __init__(self, url: str, stem: str = "model", spans: Mapping[str, Sequence[Span]] | None = None) -> None:
        self.url = url
        self.damaged: list[str] = []
        self._spans = spans or {}
        self._check_headers(stem)
        self.files = open_folder(url, stem)
        self._kept = _Block("", 0, b"")

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
        size = sum(stop - start for start, stop in ranges) * dtype.itemsize
        data = torch.empty(size, dtype=torch.uint8)
        reads = _reads(place, ranges, dtype.itemsize)

        def fill(target: int, start: int, stop: int) -> None:
            part = self._bytes(file, place, start, stop)
            data[target : target + stop - start] = torch.frombuffer(bytearray(part), dtype=torch.uint8)

        if place.stop - place.start <= SMALL_BYTES or len(reads) < 2:
            for read in reads:
                fill(*read)
        else:
            with ThreadPoolExecutor(READS_AT_ONCE) as pool:
                list(pool.map(fill, *zip(*reads, strict=True)))
        return data.view(getattr(torch, dtype.torch_name))

    def _bytes(self, file: StoredFile, place: StoredTensor, start: int, stop: int) -> memoryview | bytes:
        if place.stop - place.start > SMALL_BYTES:
            return self._read(file.name, start, stop)
        if self._kept.file != file.name or not self._kept.start <= start <= stop <= self._kept.stop:
            end = _end_of_small(file, place)
            self._kept = _Block(file.name, place.start, self._read(file.name, place.start, end))
        return memoryview(self._kept.data)[start - self._kept.start : stop - self._kept.start]

    def _check_headers(self, stem: str) -> None:
        names = [name for name in self._spans if name.startswith((f"{stem}.", f"{stem}-")) and self._spans[name]]
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            list(pool.map(self._check_header, names))

    def _check_header(self, name: str) -> None:
        spans = self._spans[name]
        read_checked(self.url, name, spans, 0, spans[0].length)

    def _read(self, name: str, start: int, stop: int) -> memoryview | bytes:
        if name in self._spans:
            try:
                return read_checked(self.url, name, self._spans[name], start, stop)
            except DamagedError as error:
                self.damaged.append(str(error))
        return storage.read_range(storage.join(self.url, name), start, stop)

    def read_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor in its shape."""
        spec = self.spec(name)
        return self.read(name, [(0, num_elements(spec))]).reshape(spec.shape)


class _Block(NamedTuple):
    """Bytes of a file from `start` on."""

    file: str
    start: int
    data: memoryview | bytes

    @property
    def stop(self) -> int:
        return self.start + len(self.data)


def _end_of_small(file: StoredFile, place: StoredTensor) -> int:
    """Where the small tensors that follow a small tensor end, or where a read of them does."""
    end = place.stop
    for tensor in file.tensors[bisect_left(file.tensors, place.start, key=lambda tensor: tensor.start) :]:
        if tensor.stop - tensor.start > SMALL_BYTES or tensor.stop - place.start > READ_BYTES:
            break
        end = max(end, tensor.stop)
    return end


def _reads(place: StoredTensor, ranges: Sequence[Range], itemsize: int) -> list[tuple[int, int, int]]:
    """(place in the result, first byte, end) of each ranged read; ranges that touch are read as one."""
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
        end = place.start + stop * itemsize
        for first in range(place.start + start * itemsize, end, READ_BYTES):
            reads.append((target, first, min(first + READ_BYTES, end)))
            target += min(first + READ_BYTES, end) - first
    return reads
