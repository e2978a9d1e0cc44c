"""Runs the members of a batch, some at once, each as a command of its own: what one of them dies of, the others do not
notice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ...distributed.again import Flags
from .members import Member
from .slots import with_slot

POLL_S = 0.2


@dataclass
class Running:
    """A member that has been started, in a slot."""

    member: Member
    slot: int
    process: subprocess.Popen[bytes]
    began_s: float


Watch = Callable[[Sequence[Running]], None]
"""Told now and then of what runs."""

Ended = Callable[[Member, int, float], None]
"""Told of a member that has ended: with which exit code, after how many seconds."""


def command_of(member: Member, flags: Flags) -> list[str]:
    """The command that runs a member: what a user would type, but for how it is found. Variables in overrides are
    filled in there, so nothing secret is on it."""
    allowed = [
        option
        for option, given in (
            ("--accept-changes", flags.accept_changes),
            ("--accept-changed-data", flags.accept_changed_data),
        )
        if given
    ]
    program = [sys.executable, "-P", "-m", "ftlaunch.launcher.cli"]
    return [*program, str(member.recipe), *member.overrides, *allowed]


@dataclass
class Runner:
    """`slots`: the variables of each place in which members take turns. `folder`: where what they print goes."""

    slots: Sequence[Mapping[str, str]]
    environ: Mapping[str, str]
    folder: Path
    flags: Flags
    place: Sequence[str]
    """Options of the command line that say where members run."""
    watch: Watch
    ended: Ended
    exit_codes: dict[str, int] = field(default_factory=dict)
    """Of the members that have ended, by name."""
    interrupted: bool = False
    _running: list[Running] = field(default_factory=list)

    def run(self, members: Sequence[Member]) -> None:
        """Start all members, never more at once than there are slots, and wait for their ends. After Ctrl-C none is
        started any more, and those that run are told to save."""
        waiting = list(members)
        with self._interrupts():
            while self._running or (waiting and not self.interrupted):
                while waiting and not self.interrupted and (slot := self._free_slot()) is not None:
                    self._start(waiting.pop(0), slot)
                time.sleep(POLL_S)
                self._collect()
                self.watch(self._running)

    def log(self, member: Member) -> Path:
        """What a member has printed."""
        return self.folder / f"{member.name}.log"

    def _free_slot(self) -> int | None:
        taken = {running.slot for running in self._running}
        return next((slot for slot in range(len(self.slots)) if slot not in taken), None)

    def _start(self, member: Member, slot: int) -> None:
        with self.log(member).open("ab") as log:
            process = subprocess.Popen(
                [*command_of(member, self.flags), *self.place],
                env=with_slot(self.environ, self.slots[slot]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is passed on once, by us
            )
        self._running.append(Running(member, slot, process, time.monotonic()))

    def _collect(self) -> None:
        for running in [*self._running]:
            code = running.process.poll()
            if code is not None:
                self._running.remove(running)
                self.exit_codes[running.member.name] = code
                self.ended(running.member, code, time.monotonic() - running.began_s)

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        def pass_on(number: int, _frame: FrameType | None) -> None:
            self.interrupted = True
            for running in self._running:
                running.process.send_signal(signal.SIGINT)

        previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def exit_code(codes: Mapping[str, int], *, interrupted: bool) -> int:
    """Of the batch: 130 after Ctrl-C; else 2 if infrastructure failed one of its runs (or something killed it), 1 if
    one has a mistake that the user can mend, 0 if all went well."""
    if interrupted:
        return 130
    failed = set(codes.values()) - {0}
    return 0 if not failed else 1 if failed == {1} else 2
