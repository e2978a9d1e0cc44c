"""Who says how a run ended, how far its ranks are, and why they are to leave."""

from __future__ import annotations

from typing import Any

from ftlaunch.launcher.control import Control, Ending, Move, Progress

DONE = Ending("finished")
MISTAKE = Ending("failed", "out of memory", 1)
ECHO = Ending("failed", "rank 0 failed reading: no such file", 1)
MOVE = Move("resize", "3 nodes are there")


def ended(*said: tuple[Ending, int]) -> Ending | None:
    control = Control()
    for ending, rank in said:
        control.end(ending, rank)
    return control.take()[1]


def test_rank_0_counts_and_another_until_it_speaks():
    assert ended() is None
    assert ended((MISTAKE, 3)) == MISTAKE
    assert ended((MISTAKE, 3), (ECHO, 1)) == MISTAKE
    assert ended((ECHO, 1), (MISTAKE, 0)) == MISTAKE
    assert ended((MISTAKE, 0), (ECHO, 1)) == MISTAKE
    assert ended((MISTAKE, 3), (DONE, 0)) == DONE  # the ranks were started again


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(seconds: float) -> dict[str, Any]:
    return {"kind": "step", "step": 1, "step_s": seconds}


def test_how_far_ranks_are():
    clock = Clock()
    control = Control(clock)
    control.emit({"kind": "phase", "phase": "training"})
    control.emit(step(3.0))
    control.emit(step(2.0))
    clock.now = 7.0
    assert control.progress() == Progress("training", 7.0, 2, 3.0)
    control.tell({"kind": "message", "level": "warning", "text": "not a sign of life"})
    assert control.progress().idle_s == 7.0
    control.begin()
    assert control.progress() == Progress("starting", 0.0, 0, 0.0)
    assert len(control.take()[0]) == 4


def test_ranks_leave_to_move_and_to_stop():
    control = Control()
    assert not control.emit(step(1.0))
    control.request_move(MOVE)
    assert control.emit(step(1.0))
    assert control.why_leave() == MOVE
    control.request_stop()
    assert control.why_leave() is None  # who asked to stop is not started again
    control.begin()
    assert control.emit(step(1.0))


def test_a_move_is_over_with_the_next_start():
    control = Control()
    control.request_move(MOVE)
    control.begin()
    assert not control.emit(step(1.0))
    assert control.why_leave() is None


def test_nodes_that_are_about_to_go():
    control = Control()
    assert control.noticed() == set()
    control.notice("a")
    control.begin()
    assert control.noticed() == {"a"}
