"""What is started again after its end, and what would only end again."""

from __future__ import annotations

import signal

import pytest

from ftlaunch.cluster.restarts import AGAIN, MAX_QUICK, QuickEnds, final, why_again


@pytest.mark.parametrize(
    ("code", "why", "told"),
    [
        (0, None, 0),
        (1, None, 1),
        (2, None, 2),
        (130, None, 130),
        (AGAIN, "", 2),
        (-signal.SIGKILL, "the driver was killed (SIGKILL)", 137),
        (-signal.SIGSEGV, "the driver was killed (SIGSEGV)", 139),
    ],
)
def test_codes(code, why, told):
    assert why_again(code, spoke=True) == why
    assert final(code) == told


def test_a_driver_that_says_nothing_was_ended_by_ray():
    assert why_again(1, spoke=False) == "Ray has ended, and its driver with it (exit code 1)"
    assert why_again(AGAIN, spoke=False) == ""


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_quick_ends_are_few():
    clock = Clock()
    ends = QuickEnds(5.0, clock)

    def lives(seconds: float) -> bool:
        ends.started()
        clock.now_s += seconds
        return ends.ended()

    assert [lives(1.0) for _ in range(MAX_QUICK)] == [True] * MAX_QUICK
    assert lives(10.0)
    assert [lives(1.0) for _ in range(MAX_QUICK + 1)] == [True] * MAX_QUICK + [False]
