"""Who says how a run ended."""

from __future__ import annotations

from ftlaunch.launcher.control import Control, Ending

DONE = Ending("finished")
MISTAKE = Ending("failed", "out of memory", 1)
ECHO = Ending("failed", "rank 0 failed reading: no such file", 1)


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


def test_only_a_second_start_is_said():
    control = Control()
    control.begin()
    assert control.take() == ([], None)
    control.begin()
    [message] = control.take()[0]
    assert "started again (start 2)" in message["text"]
