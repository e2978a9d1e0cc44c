"""When ranks are looked at, and what is found: nodes that are gone, ranks that do not answer, ranks that are slow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from stack_samples import READS, STEPS, SUMS

from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher import watch as watches
from ftlaunch.launcher.control import Progress
from ftlaunch.launcher.failure import Hangs, NodeLost
from ftlaunch.launcher.live_nodes import Absence, Names
from ftlaunch.launcher.watch import LOST_S, Rank, Watch, patience_s

TIMEOUT_S = 10.0


class Nodes:
    """Stands for the cluster."""

    def __init__(self) -> None:
        self.names, self.gone, self.asked = Names(), set[str](), 0
        self.why: Absence = "silent"

    def lost(self) -> dict[str, Absence]:
        self.asked += 1
        return dict.fromkeys(self.gone, self.why)


@dataclass
class Bed:
    """A watch over two ranks on nodes a and b."""

    monkeypatch: pytest.MonkeyPatch
    run: RunDirectory
    now_s: float = 100.0
    progress: Progress = field(default_factory=lambda: Progress("training", 0.0, 5, 1.0))
    unanswered_s: float = 0.0
    stacks: list[Any] = field(default_factory=lambda: [SUMS, SUMS])
    said: list[str] = field(default_factory=list)
    looks: int = 0

    def __post_init__(self) -> None:
        self.nodes = Nodes()
        self.watch = Watch(
            self.nodes, self.run, TIMEOUT_S, lambda: self.progress, self.said.append, clock=lambda: self.now_s
        )
        self.monkeypatch.setattr(watches, "take", self._take)
        self.monkeypatch.setattr(Watch, "_see", lambda _watch, rank: f"saw process {rank.pid}")

    def _take(self, ranks: dict[int, Rank]) -> dict[int, Any]:
        self.looks += 1
        return dict(zip(ranks, self.stacks, strict=True))

    def look(self, after_s: float = 2.0) -> dict[int, Exception]:
        self.now_s += after_s
        return self.watch.look({0: Rank("a", 7, 0.0, None), 1: Rank("b", 8, self.unanswered_s, None)})

    def idle(self, seconds: float) -> None:
        self.progress = Progress("training", seconds, 5, 1.0)


@pytest.fixture
def bed(monkeypatch, tmp_path) -> Bed:
    return Bed(monkeypatch, RunDirectory(str(tmp_path)))


@pytest.mark.parametrize(
    ("progress", "patience"),
    [
        (Progress("training", steps=9, longest_step_s=0.5), 10.0),
        (Progress("training", steps=9, longest_step_s=7.0), 35.0),
        (Progress("training", steps=1, longest_step_s=7.0), 100.0),
        (Progress("saving", steps=9, longest_step_s=0.5), float("inf")),
        (Progress("reading the data's index"), float("inf")),
    ],
)
def test_patience(progress, patience):
    assert patience_s(progress, TIMEOUT_S) == patience


def test_nobody_is_looked_at_while_steps_are_taken(bed):
    assert bed.look() == bed.look() == {}
    assert (bed.looks, bed.nodes.asked) == (0, 0)


def test_a_silent_rank_whose_node_is_gone(bed):
    bed.unanswered_s, bed.nodes.gone = 4.0, {"b", "elsewhere"}
    assert bed.look() == {}
    found = bed.look(after_s=LOST_S)
    assert {rank: type(error) for rank, error in found.items()} == {1: NodeLost}


def test_a_node_on_which_ray_has_ended_is_lost_at_once(bed):
    bed.nodes.gone, bed.nodes.why = {"b"}, "ended"
    ranks = {0: Rank("a", 7, 0.0, None), 1: Rank("b", 8, 0.0, None)}
    assert {rank: type(error) for rank, error in bed.watch.ended(ranks).items()} == {1: NodeLost}
    assert bed.look() == {}, "nobody is silent: nobody was asked"
    bed.unanswered_s = 1.5
    assert {rank: type(error) for rank, error in bed.look().items()} == {1: NodeLost}
    bed.nodes.why = "silent"
    assert bed.watch.ended(ranks) == {}


def test_a_node_that_comes_back_is_not_lost(bed):
    bed.unanswered_s, bed.nodes.gone = 4.0, {"b"}
    bed.look()
    bed.nodes.gone = set()
    assert bed.look() == {}
    bed.nodes.gone = {"b"}
    assert bed.look(after_s=LOST_S) == {}


def test_a_silent_rank_on_a_live_node_hangs_after_the_time_out(bed):
    bed.unanswered_s, bed.stacks = 9.0, [SUMS, None]
    assert bed.look() == {}
    bed.unanswered_s = 11.0
    found = bed.look()
    assert {rank: type(error) for rank, error in found.items()} == {1: Hangs}
    assert "rank 1 does not answer; rank 0 waits in all_reduce (in Group.sum)" in str(found[1])
    where = str(found[1]).rpartition("Stacks of all ranks: ")[2]
    text = Path(where).read_text()
    assert "all_reduce" in text
    assert "=== rank 1\n\nsaw process 8" in text


def test_ranks_that_all_wait_hang_at_the_second_look(bed):
    bed.idle(11.0)
    assert bed.look() == {}
    bed.idle(13.0)
    assert bed.look() == {}
    assert bed.looks == 1  # the second look is a time-out later
    bed.idle(22.0)
    found = bed.look(after_s=TIMEOUT_S)
    assert sorted(found) == [0, 1]
    assert "all ranks wait for each other" in str(found[0])


def test_a_rank_that_may_be_slow_is_told_and_given_time(bed):
    bed.stacks = [SUMS, READS]
    for seconds in range(11, 110, 11):
        bed.idle(float(seconds))
        assert bed.look(after_s=11.0) == {}
    assert len(bed.said) == 1
    assert "rank 1 is stuck in read (in read_range)" in bed.said[0]
    for seconds in range(110, 150, 11):
        bed.idle(float(seconds))
        if found := bed.look(after_s=11.0):
            break
    assert list(found) == [1]


def test_a_rank_that_moves_is_given_more_time(bed):
    for stacks in ([SUMS, READS], [SUMS, STEPS]) * 20:
        bed.stacks = stacks
        bed.idle(1e4)
        assert bed.look(after_s=11.0) == {}
    assert bed.said == []


def test_other_ranks_begin_anew(bed):
    bed.idle(11.0)
    bed.look()
    bed.watch.begin()
    assert bed.look(after_s=TIMEOUT_S) == {}
    assert bed.looks == 2
