"""One part of a checkpoint ("model", "exp_avg", ...) before it is written: its files, and which rank supplies what."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from .dealing import Cut, Dealer, by_file
from .exchange import CHUNK_BYTES, Ranges, Segment
from .fragments import Fragment, TensorSpec
from .layout import DTYPES, MAX_FILE_BYTES, FileSet, StoredFile, plan_files
from .peers import Peers

Source = Callable[[], Iterable[Fragment]]
"""Begins a new walk over what this rank holds of a part: the same names in the same order on every rank and on every
walk. A fragment's memory must stay as it is until the save is over."""


@dataclass(frozen=True)
class PartPlan:
    """What does not change between the saves of a run: the files, who writes what of them, and who supplies it.

    `cuts` by file name; the writer of a file's first byte makes the file. `specs` in the source's order; `held[i]` are
    the ranges of `specs[i]` that this rank's source yields, and `segments[i]` tile it with the ranks that supply it.
    """

    files: FileSet
    cuts: dict[str, Cut]
    specs: tuple[TensorSpec, ...]
    held: tuple[Ranges, ...]
    segments: tuple[tuple[Segment, ...], ...]
    rank: int
    frozen: frozenset[str] = frozenset()
    """Tensors that never change."""
    linked: frozenset[str] = frozenset()
    """Files that are there already, as an earlier save wrote them."""
    chunk_bytes: int = CHUNK_BYTES

    def owned(self) -> list[StoredFile]:
        """Files that this rank makes."""
        return [f for f in self.files.files if self.cuts[f.name].writer(0) == self.rank and f.name not in self.linked]

    def frozen_files(self) -> list[str]:
        """Names of files in which nothing ever changes."""
        return [f.name for f in self.files.files if f.tensors and all(t.spec.name in self.frozen for t in f.tensors)]

    def supplied(self, position: int) -> Ranges:
        """The ranges of `specs[position]` that this rank supplies."""
        mine = (segment for segment in self.segments[position] if segment.rank == self.rank)
        return tuple((segment.start, segment.stop) for segment in mine)

    def copied_bytes(self) -> int:
        """Bytes that a copy of what this rank supplies takes; nothing for what never changes."""
        return sum(
            sum(stop - start for start, stop in self.supplied(position)) * DTYPES[spec.dtype].itemsize
            for position, spec in enumerate(self.specs)
            if spec.name not in self.frozen
        )

    def of_copies(self) -> PartPlan:
        """The same for a source that yields copies of just what this rank supplies, and as it is what never changes."""
        held = zip(self.specs, self.held, strict=True)
        copied = [ranges if spec.name in self.frozen else self.supplied(i) for i, (spec, ranges) in enumerate(held)]
        return replace(self, held=tuple(copied))


def plan_part(
    source: Source,
    stem: str,
    peers: Peers,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    frozen: Collection[str] = (),
    deal: Dealer = by_file,
    load: list[int] | None = None,
) -> PartPlan:
    """Walk the source once for names and ranges, and tell them to each other; collective. `load`: bytes that each rank
    writes of other parts, which is added to.

    Raises ValueError on every rank if the ranks name different tensors or leave elements out.
    """
    with peers.together(f"listing the tensors of {stem}"):
        mine = [(fragment.spec, fragment.ranges) for fragment in source()]
    specs = tuple(spec for spec, _ in mine)
    everyone = peers.gather((zlib.crc32(repr(specs).encode()), tuple(ranges for _, ranges in mine)))
    if len({digest for digest, _ in everyone}) > 1:
        raise ValueError(f"the ranks do not yield the same tensors of {stem} in the same order")
    held = tuple(ranges for _, ranges in everyone)
    files = plan_files(specs, stem=stem, max_file_bytes=max_file_bytes, frozen=frozen)
    dealt = deal(files, specs, held, [0] * peers.size if load is None else load)
    return PartPlan(files, dealt.cuts, specs, held[peers.rank], dealt.segments, peers.rank, frozenset(frozen))


@dataclass(frozen=True)
class Part:
    """What is to be saved of one part: its `source`, into the files of its `plan`, in the folder `directory`."""

    source: Source
    directory: str
    plan: PartPlan


class Held:
    """A fragment as bytes in its spec's dtype, found by element range."""

    def __init__(self, fragment: Fragment) -> None:
        self.spec = fragment.spec
        self.itemsize = DTYPES[fragment.spec.dtype].itemsize
        self._dtype = getattr(torch, DTYPES[fragment.spec.dtype].torch_name)
        self._ranges = fragment.ranges
        self._begins = list(accumulate((stop - start for start, stop in fragment.ranges), initial=0))
        self._values = fragment.values.detach().reshape(-1)

    def values(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop), which lie in one of the ranges, as and where the fragment has them."""
        for (low, high), begin in zip(self._ranges, self._begins, strict=False):
            if low <= start and stop <= high:
                return self._values[begin + start - low : begin + stop - low]
        raise ValueError(f"elements {start} to {stop} of {self.spec.name} are not in this fragment")

    def copy(self, start: int, stop: int, target: torch.Tensor) -> None:
        """The bytes of elements [start, stop) into `target`, in their dtype."""
        target.view(self._dtype).copy_(self.values(start, stop))

    def view(self, start: int, stop: int) -> torch.Tensor:
        """The bytes of elements [start, stop); no copy of what lies on the host in the right dtype."""
        found = self.values(start, stop).to("cpu", self._dtype).contiguous()
        return found.as_strided(found.shape, (1,)).view(torch.uint8)  # a single element is contiguous at any stride

    def join(self, pieces: Sequence[Segment]) -> torch.Tensor:
        """The bytes of several pieces, one after the other; a copy only if there is more than one."""
        views = [self.view(piece.start, piece.stop) for piece in pieces]
        return views[0] if len(views) == 1 else torch.cat(views)


def walk(source: Source, plan: PartPlan, failures: list[Exception]) -> Iterator[tuple[int, Fragment]]:
    """This rank's fragments with their position in the plan, larger elements first as files have them (a part of one
    element size, which is nearly every part, is walked once). From a failure on, zeros stand in for them."""
    for itemsize in sorted({DTYPES[spec.dtype].itemsize for spec in plan.specs}, reverse=True):
        fragments = _noted(source, plan, failures)
        for position, spec in enumerate(plan.specs):
            fragment = next(fragments, None) or _zeros(spec, plan.held[position])
            if DTYPES[spec.dtype].itemsize == itemsize:
                yield position, fragment


def _noted(source: Source, plan: PartPlan, failures: list[Exception]) -> Iterator[Fragment]:
    """The source's fragments; on a failure it is noted and they end."""
    if failures:
        return
    try:
        yield from as_planned(source, plan)
    except Exception as error:
        failures.append(error)


def as_planned(source: Source, plan: PartPlan) -> Iterator[Fragment]:
    """The source's fragments. Raises ValueError when they are not those of the plan."""
    for spec, ranges, fragment in zip(plan.specs, plan.held, source(), strict=True):
        count = sum(stop - start for start, stop in ranges)
        if (fragment.spec, fragment.ranges, fragment.values.numel()) != (spec, ranges, count):
            raise ValueError(f"{fragment.spec.name} is not what was planned for {spec.name} on rank {plan.rank}")
        yield fragment


def _zeros(spec: TensorSpec, ranges: Ranges) -> Fragment:
    count = sum(stop - start for start, stop in ranges)
    return Fragment(spec, ranges, torch.zeros(count, dtype=getattr(torch, DTYPES[spec.dtype].torch_name)))
