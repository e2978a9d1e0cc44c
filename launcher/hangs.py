"""Whether ranks hang, and which of them is to blame, from two looks at their stacks. Pure.

In a training step ranks wait for each other in collectives, so one that is stuck soon has all others wait. The one to
blame is the one that does not answer; where all answer, the one that is not in the collective that the others are in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .stacks import TRAINING, Call, Stack

Look = Mapping[int, Sequence[Stack] | None]
"""Rank -> the stacks of its threads; None: it did not answer."""

_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
_WRAPPERS = ("wrapper", "inner", "_object_to_tensor")


@dataclass(frozen=True)
class Hang:
    """`ranks` are those to blame; none: it cannot be told. `says` is for people. `certain`: no rank will go on by
    itself; otherwise one may only be slow, as with a store that does not answer."""

    ranks: tuple[int, ...]
    says: str
    certain: bool = True


def training_of(stacks: Sequence[Stack] | None) -> tuple[Call, ...]:
    """The calls of a rank's training; empty for one that did not answer."""
    return next((stack.calls for stack in stacks or () if stack.thread.startswith(TRAINING)), ())


def collective_of(calls: Sequence[Call]) -> str | None:
    """Name of the collective that these calls are in; None: in none."""
    found = [call.function for call in calls if call.file.endswith(_COLLECTIVES)]
    names = [name.rpartition(".")[2] for name in found]
    return next((name for name in names if name not in _WRAPPERS and not name.startswith("_")), None)


def place_of(calls: Sequence[Call]) -> str:
    """Where a rank is, in words."""
    ours = [call for call in calls if "/distributed/" in call.file and "/torch/" not in call.file]
    where = f" (in {ours[-1].function})" if ours else ""
    if collective := collective_of(calls):
        return f"{collective}{where}"
    return f"{calls[-1].function}{where}" if calls else "nowhere"


def find_hang(look: Look, earlier: Look | None) -> Hang | None:
    """What a look shows, along with one some time before; None: it may go on yet. `earlier` None: the first look."""
    silent = tuple(rank for rank, stacks in look.items() if stacks is None)
    if silent:
        return Hang(silent, f"{_ranks(silent)} {'does' if len(silent) == 1 else 'do'} not answer; {_waiting(look)}")
    if earlier is None or any(training_of(look[rank]) != training_of(earlier.get(rank)) for rank in look):
        return None
    inside = {rank: collective_of(training_of(stacks)) for rank, stacks in look.items()}
    outside = tuple(rank for rank, collective in inside.items() if collective is None)
    if outside:
        where = place_of(training_of(look[outside[0]]))
        be = "is" if len(outside) == 1 else "are"
        return Hang(outside, f"{_ranks(outside)} {be} stuck in {where}; {_waiting(look)}", certain=False)
    usual, count = Counter(inside.values()).most_common(1)[0]
    others = tuple(rank for rank, collective in inside.items() if collective != usual)
    if others and count > len(others):
        where = place_of(training_of(look[others[0]]))
        return Hang(others, f"{_ranks(others)} in {where} while {_waiting(look)}")
    return Hang((), f"all ranks wait for each other: {_waiting(look)}")


def _waiting(look: Look) -> str:
    """Who waits in what."""
    places: dict[str, list[int]] = {}
    for rank, stacks in look.items():
        calls = training_of(stacks)
        if collective_of(calls):
            places.setdefault(place_of(calls), []).append(rank)
    if not places:
        return "no rank waits in a collective"
    place, ranks = max(places.items(), key=lambda item: len(item[1]))
    return f"{_ranks(ranks)} {'waits' if len(ranks) == 1 else 'wait'} in {place}"


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 2`, `ranks 0, 1, 3`, `ranks 0, 1, 2 and 61 more`."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def report(look: Look, seen: Mapping[int, str]) -> str:
    """All that a look has seen, as text. `seen`: of ranks that did not answer."""
    parts = []
    for rank, stacks in sorted(look.items()):
        lines = [seen.get(rank, "it did not answer")] if stacks is None else list(map(str, stacks))
        parts.append("\n\n".join([f"=== rank {rank}", *lines]))
    return "\n\n".join(parts) + "\n"
