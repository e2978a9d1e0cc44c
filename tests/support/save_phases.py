"""Where in a save each rank is, seen from outside: ranks write it to memory that they share with who watches them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, wraps
from multiprocessing.sharedctypes import RawArray
from typing import Any

from ftlaunch.distributed.checkpoint.content import Content
from ftlaunch.distributed.checkpoint.fragments import Fragment
from ftlaunch.distributed.checkpoint.parts import Source
from ftlaunch.distributed.checkpoint.peers import Peers, Transfer
from ftlaunch.distributed.checkpoint.save import ROOT_STEMS, CheckpointWriter
from ftlaunch.distributed.checkpoint.staging import Staging
from ftlaunch.distributed.saver import Saver

PHASES = (
    "no save", "staging", "exchange", "weights", "training state", "small files", "manifest", "reading back",
    "commit record", "retention",
)  # fmt: skip
"""Staging: the state is gathered and copied, earlier commits are looked for. Exchange: a rank sends or receives what
another one writes. The others as they are called in a checkpoint's directory; a save holds them in this order."""

METHODS: tuple[tuple[type, str, str], ...] = (
    (Saver, "_gathered", "staging"),
    (CheckpointWriter, "_save_small_files", "small files"),
    (CheckpointWriter, "_save_manifest", "manifest"),
    (CheckpointWriter, "_verify", "reading back"),
    (CheckpointWriter, "_commit", "commit record"),
    (Saver, "_make_room", "retention"),
)


class Marks:
    """Shared by forked ranks. Made before the fork; no locks, which a killed rank could keep."""

    def __init__(self, size: int) -> None:
        self._phase, self._since = RawArray("i", size), RawArray("d", size)
        self._saves, self._began = RawArray("i", size), RawArray("d", size)
        self._took = RawArray("d", len(PHASES))

    def begin_attempt(self) -> None:
        """No rank has done anything; how long phases took is remembered."""
        for rank in range(len(self._phase)):
            self._phase[rank] = self._saves[rank] = 0

    def phases(self) -> list[str]:
        """Of every rank."""
        return [PHASES[number] for number in self._phase]

    def saves(self) -> int:
        """Saves that rank 0 has begun in this attempt."""
        return self._saves[0]

    def age_s(self) -> float:
        """Time since rank 0 began its last save."""
        return time.monotonic() - self._began[0]

    def usual_s(self, phase: str) -> float:
        """How long the phase took when a rank was last through it."""
        return self._took[PHASES.index(phase)]

    def enter(self, rank: int, phase: str) -> str:
        """The rank is in this phase from now on; the phase before."""
        before, now = self._phase[rank], time.monotonic()
        if before and rank == 0:
            self._took[before] = now - self._since[rank]
        self._phase[rank], self._since[rank] = PHASES.index(phase), now
        return PHASES[before]

    def begin_save(self, rank: int) -> None:
        """Called where a save begins."""
        self._began[rank] = time.monotonic()
        self._saves[rank] += 1


@dataclass(frozen=True)
class _Marked:
    """A transfer that is marked, and takes `seconds`, while it is waited for."""

    transfer: Transfer
    marks: Marks
    rank: int
    seconds: float

    def wait(self) -> None:
        before = self.marks.enter(self.rank, "exchange")
        time.sleep(self.seconds)
        self.transfer.wait()
        self.marks.enter(self.rank, before)


def watch(marks: Marks, rank: int, bytes_per_s: float, copy_s: float) -> None:
    """Mark what this process does from now on, over a network of so many bytes per second, where the copy of each part
    takes so long; for a process that will not live on."""
    for cls, name, phase in METHODS:
        setattr(cls, name, _marking(getattr(cls, name), marks, rank, phase))
    _mark_ends(marks, rank)
    _mark_parts(marks, rank, copy_s)
    for name in ("send", "receive"):
        setattr(Peers, name, _marking_transfers(getattr(Peers, name), marks, rank, bytes_per_s))


def _marking(act: Callable[..., Any], marks: Marks, rank: int, phase: str) -> Callable[..., Any]:
    @wraps(act)
    def marked(*args: Any, **more: Any) -> Any:
        marks.enter(rank, phase)
        return act(*args, **more)

    return marked


def _mark_ends(marks: Marks, rank: int) -> None:
    gathered, write = Saver._gathered, Saver._write

    def beginning(self: Saver, *args: Any) -> Any:
        marks.begin_save(rank)
        return gathered(self, *args)

    def ending(self: Saver, *args: Any) -> None:
        try:
            write(self, *args)
        finally:
            marks.enter(rank, "no save")

    Saver._gathered, Saver._write = beginning, ending


def _mark_parts(marks: Marks, rank: int, copy_s: float) -> None:
    save_parts, copy_part = CheckpointWriter._save_parts, Staging._copy_part

    def saving(self: CheckpointWriter, directory: str, content: Content, *args: Any) -> Any:
        phases = {stem: "weights" if stem in ROOT_STEMS else "training state" for stem in content.parts}
        parts = {stem: partial(_seen, source, marks, rank, phases[stem]) for stem, source in content.parts.items()}
        return save_parts(self, directory, replace(content, parts=parts), *args)

    def copying(self: Staging, *args: Any) -> Any:
        time.sleep(copy_s)
        return copy_part(self, *args)

    CheckpointWriter._save_parts, Staging._copy_part = saving, copying


def _seen(source: Source, marks: Marks, rank: int, phase: str) -> Iterator[Fragment]:
    """Each tensor marks the part that it is of: parts may be written side by side."""
    for fragment in source():
        marks.enter(rank, phase)
        yield fragment


def _marking_transfers(start: Callable[..., Any], marks: Marks, rank: int, bytes_per_s: float) -> Callable[..., Any]:
    @wraps(start)
    def started(self: Peers, data: Any, other: int) -> _Marked:
        return _Marked(start(self, data, other), marks, rank, len(data) / bytes_per_s)

    return started
