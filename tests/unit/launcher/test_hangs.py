"""Who is to blame when ranks wait for each other: from stacks as they are taken, and as they might be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from stack_samples import GATHERS, READS, STEPS, SUMS

from ftlaunch.launcher.hangs import collective_of, find_hang, place_of, report, training_of
from ftlaunch.launcher.stacks import TRAINING, look_and_end, take_stacks


def test_where_a_rank_is():
    assert collective_of(training_of(SUMS)) == "all_reduce"
    assert collective_of(training_of(GATHERS)) == "all_gather_object"
    assert collective_of(training_of(READS)) is None
    assert place_of(training_of(SUMS)) == "all_reduce (in Group.sum)"
    assert place_of(training_of(READS)) == "read (in read_range)"
    assert training_of(None) == ()


@pytest.mark.parametrize(
    ("look", "earlier", "ranks", "certain", "words"),
    [
        ([SUMS, None, SUMS], None, (1,), True, "rank 1 does not answer; ranks 0, 2 wait in all_reduce (in Group.sum)"),
        ([None, SUMS, None], None, (0, 2), True, "ranks 0, 2 do not answer; rank 1 waits in all_reduce"),
        ([None], None, (0,), True, "rank 0 does not answer; no rank waits in a collective"),
        ([SUMS, READS], [SUMS, READS], (1,), False, "rank 1 is stuck in read (in read_range); rank 0 waits in"),
        ([SUMS, GATHERS, SUMS], [SUMS, GATHERS, SUMS], (1,), True, "rank 1 in all_gather_object (in Peers.gather)"),
        ([SUMS, GATHERS], [SUMS, GATHERS], (), True, "all ranks wait for each other"),
        ([SUMS, SUMS], [SUMS, SUMS], (), True, "ranks 0, 1 wait in all_reduce (in Group.sum)"),
    ],
)  # fmt: skip
def test_who_is_to_blame(look, earlier, ranks, certain, words):
    hang = find_hang(dict(enumerate(look)), None if earlier is None else dict(enumerate(earlier)))
    assert (hang.ranks, hang.certain) == (ranks, certain)
    assert words in hang.says


@pytest.mark.parametrize("earlier", [None, [SUMS, STEPS], [STEPS, READS]])
def test_ranks_that_move_do_not_hang(earlier):
    assert find_hang(dict(enumerate([SUMS, READS])), None if earlier is None else dict(enumerate(earlier))) is None


def test_the_report_has_all_threads_and_what_was_seen():
    text = report({1: None, 0: SUMS}, {1: "the process is in state T (stopped)"})
    assert text.index("=== rank 0") < text.index("all_reduce") < text.index("Thread pulse") < text.index("=== rank 1")
    assert text.endswith("=== rank 1\n\nthe process is in state T (stopped)\n")


def test_stacks_of_this_process():
    over = threading.Event()

    def stuck_here() -> None:
        over.wait()

    thread = threading.Thread(target=stuck_here, name=f"{TRAINING}(train)")
    thread.start()
    try:
        stacks = take_stacks()
    finally:
        over.set()
        thread.join()
    assert stacks[0].thread == f"{TRAINING}(train)"
    functions = [call.function for call in training_of(stacks)]
    assert any(name.endswith("stuck_here") for name in functions)
    assert functions[-1].endswith("wait")


STUCK = """
import sys, time
from pathlib import Path
from ftlaunch.launcher.stacks import dump_on_signal
dump_on_signal(Path(sys.argv[1]))
def stuck_there():
    print("ready", flush=True)
    time.sleep(600)
stuck_there()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_another_process_is_looked_at_and_ended(stopped, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(tmp_path)], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    if stopped:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
    seen = look_and_end(tmp_path, process.pid)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert ("state T (stopped)" in seen) == stopped
    assert ("stuck_there" in seen) == (not stopped)


def test_a_process_that_is_gone(tmp_path):
    assert look_and_end(tmp_path, 2**22 + 1) == "the process is gone"
