"""Whether a run was held up by its data, and what to do about it. Pure."""

from __future__ import annotations

from . import units
from .record import Line, Record

WAITING_SHARE = 0.1
"""Of the time in steps: from here on the data is called the bottleneck. Less is lost in the spread of step times."""

WAITING_S = 1.0
"""In all: less is nothing to think about, however short the run."""

READ_AGAIN = 1.2
"""Bytes read to bytes needed: from here on it is said that blocks are read more than once."""

ENOUGH_BYTES = 256 * 2**20
"""Of needed bytes, for a ratio to them to mean something: what is read ahead counts as read, and not yet as needed."""


def waiting_share(record: Record) -> float:
    """Share of the time in steps in which ranks waited for data. The first step of each attempt is left out: readers
    have just started."""
    waited_s, in_steps_s = _waiting(record)
    return waited_s / in_steps_s if in_steps_s > 0 else 0.0


def data_bottleneck(record: Record) -> str | None:
    """What to say when the data holds the run up; None: it does not."""
    share = waiting_share(record)
    if share <= WAITING_SHARE or _waiting(record)[0] < WAITING_S:
        return None
    return (
        f"the data is the bottleneck: ranks waited for it in {share:.0%} of the time. Let more processes read and "
        "tokenise (data.reader_processes), if there are cores for them, or tokenise ahead of time (ftlaunch prepare)."
        f"{_read_again(record)}"
    )


def bytes_read(record: Record) -> tuple[int, int] | None:
    """Stored bytes of the blocks that were read, and of their rows that were served; None: too few to compare."""
    read, needed = (sum(int(line.get(f"data_{name}_bytes", 0)) for line in record.steps) for name in ("read", "needed"))
    return (read, needed) if needed >= ENOUGH_BYTES else None


def _read_again(record: Record) -> str:
    compared = bytes_read(record)
    if compared is None or compared[0] <= READ_AGAIN * compared[1]:
        return ""
    read, needed = map(units.size, compared)
    return (
        f" {read} were read to serve {needed}: the files' blocks are large for so many streams. Write parquet with "
        "smaller row groups (8 to 64 MiB), or lower data.streams."
    )


def _waiting(record: Record) -> tuple[float, float]:
    """Seconds in which ranks waited for data, and of steps as a whole."""
    steps = _settled(record)
    return sum(float(line["data_wait_s"]) for line in steps), sum(float(line["step_s"]) for line in steps)


def _settled(record: Record) -> list[Line]:
    first: dict[int, int] = {}
    for line in record.steps:
        first.setdefault(int(line["attempt"]), int(line["step"]))
    return [line for line in record.steps if int(line["step"]) != first[int(line["attempt"])]]
