"""Which rank writes which bytes of a part's files, and which rank supplies them: pure arithmetic, equal on every rank.

Where ranks share a local folder each writes what it holds. Where a file must be streamed it has one writer. An object
store that takes parts of a file from anybody has a writer for each of them, which is best the rank that holds it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .. import storage
from .exchange import Range, Ranges, Segment, chunks, cover, deal
from .fragments import TensorSpec
from .layout import DTYPES, FileSet, StoredFile, StoredTensor, num_elements


@dataclass(frozen=True)
class Cut:
    """A file in blocks of `step` bytes (the last may be shorter), and the writer of each."""

    step: int
    writers: tuple[int, ...]

    def writer(self, offset: int) -> int:
        """The rank that writes the byte at `offset`."""
        return self.writers[offset // self.step]

    def pieces(self, place: StoredTensor, chunk_bytes: int) -> Iterator[Range]:
        """A tensor in element ranges of at most `chunk_bytes`, each within one block and one span."""
        size = DTYPES[place.spec.dtype].itemsize
        for low, stop in chunks(place.spec, chunk_bytes):
            start = low
            while start < stop:
                left = self.step - (place.start + start * size) % self.step
                end = min(stop, start + left // size)
                yield start, end
                start = end


class Dealt(NamedTuple):
    """The blocks of every file, and segments that tile each tensor (in the specs' order) with its suppliers."""

    cuts: dict[str, Cut]
    segments: tuple[tuple[Segment, ...], ...]


Dealer = Callable[[FileSet, Sequence[TensorSpec], Sequence[Sequence[Ranges]], list[int]], Dealt]
"""(files, specs, ranges held by rank and tensor, bytes that each rank writes so far, which is added to) -> Dealt.
Raises ValueError for elements that nobody holds."""


def by_holder(files: FileSet, specs: Sequence[TensorSpec], held: Sequence[Sequence[Ranges]], load: list[int]) -> Dealt:
    """Every rank writes what it holds; what several hold is dealt by bytes. The cuts say who makes a file."""
    cuts = _whole_files(files, [0] * len(held))
    return Dealt(cuts, _supplied(files, specs, lambda i, spec: deal([ranges[i] for ranges in held], spec, load)))


def by_file(files: FileSet, specs: Sequence[TensorSpec], held: Sequence[Sequence[Ranges]], load: list[int]) -> Dealt:
    """Every file has one writer, so that they all have about as many bytes to write."""
    cuts = _whole_files(files, load)
    return Dealt(cuts, _supplied_to(files, specs, held, cuts))


def by_block(files: FileSet, specs: Sequence[TensorSpec], held: Sequence[Sequence[Ranges]], load: list[int]) -> Dealt:
    """Every part of an upload has one writer: of the ranks that have no more than their share to write by then the one
    that holds most of it, else the rank with the fewest bytes so far."""
    steps = {file.name: storage.part_bytes(file.size) for file in files.files}
    shares = _shares(files, specs, held, steps)
    for file in files.files:  # blocks that hold nothing but the file's header
        for number in range(-(-file.size // steps[file.name])):
            shares.setdefault((file.name, number), {})
    limit = (sum(load) + sum(file.size for file in files.files)) / len(load)
    writers: dict[tuple[str, int], int] = {}
    for (name, number), share in shares.items():
        fits = {rank: count for rank, count in share.items() if load[rank] < limit}
        most = max(fits.values(), default=0)
        able = [rank for rank, count in fits.items() if count == most] or range(len(load))
        writers[name, number] = rank = min(able, key=load.__getitem__)
        load[rank] += steps[name]
    cuts = {file.name: Cut(steps[file.name], _writers(file, steps[file.name], writers)) for file in files.files}
    return Dealt(cuts, _supplied_to(files, specs, held, cuts))


def _whole_files(files: FileSet, load: list[int]) -> dict[str, Cut]:
    """Each file, the largest first, goes to the rank with the fewest bytes so far."""
    cuts = {}
    for file in sorted(files.files, key=lambda file: -file.size):
        rank = load.index(min(load))
        cuts[file.name] = Cut(max(file.size, 1), (rank,))
        load[rank] += file.size
    return cuts


def _writers(file: StoredFile, step: int, writers: dict[tuple[str, int], int]) -> tuple[int, ...]:
    return tuple(writers[file.name, number] for number in range(-(-file.size // step)))


def _shares(
    files: FileSet, specs: Sequence[TensorSpec], held: Sequence[Sequence[Ranges]], steps: dict[str, int]
) -> dict[tuple[str, int], dict[int, int]]:
    """(file, number of a block) -> rank -> bytes of it that the rank holds, in the order in which they are moved."""
    shares: dict[tuple[str, int], dict[int, int]] = {}
    for position, spec in enumerate(specs):
        file, place = files.places[spec.name]
        step, size = steps[file.name], DTYPES[spec.dtype].itemsize
        for rank, ranges in enumerate(held):
            for low, high in ranges[position]:
                start, stop = place.start + low * size, place.start + high * size
                for number in range(start // step, -(-stop // step)):
                    share = shares.setdefault((file.name, number), defaultdict(int))
                    share[rank] += min(stop, (number + 1) * step) - max(start, number * step)
    return shares


def _supplied_to(
    files: FileSet, specs: Sequence[TensorSpec], held: Sequence[Sequence[Ranges]], cuts: dict[str, Cut]
) -> tuple[tuple[Segment, ...], ...]:
    """Each writer supplies what it holds itself."""

    def suppliers(position: int, spec: TensorSpec) -> list[Segment]:
        file, place = files.places[spec.name]
        cut, holders = cuts[file.name], [ranges[position] for ranges in held]
        size = DTYPES[spec.dtype].itemsize
        return [
            segment
            for start, stop in cut.pieces(place, max(1, num_elements(spec)) * size)
            for segment in cover(holders, start, stop, cut.writer(place.start + start * size))
        ]

    return _supplied(files, specs, suppliers)


def _supplied(
    files: FileSet, specs: Sequence[TensorSpec], suppliers: Callable[[int, TensorSpec], list[Segment]]
) -> tuple[tuple[Segment, ...], ...]:
    segments = []
    for position, spec in enumerate(specs):
        try:
            segments.append(tuple(suppliers(position, spec)))
        except ValueError as error:
            raise ValueError(f"{files.stem}, tensor {spec.name}: {error}") from error
    return tuple(segments)
