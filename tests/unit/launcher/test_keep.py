"""The driver of a local run in a process of its own: started again when it is killed, asked to stop through the parent,
never left behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from processes import Command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a driver runs in the command's own process")

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from ftlaunch.cluster.restarts import AGAIN
from ftlaunch.launcher.keep import keep

starts = Path("starts")

def drive(beginning):
    with starts.open("a") as out:
        out.write(f"{beginning.launch}|{beginning.again}|{beginning.is_kept}|{os.getpid()}\\n")
    number = len(starts.read_text().splitlines())
    return ACTIONS[min(number, len(ACTIONS)) - 1]()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def vanish():
    os._exit(1)

def wait():
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    Path("ready").touch()
    time.sleep(600)

ACTIONS = [ACTION_LIST]
code = keep(drive)
Path("ends").open("a").write(f"{os.getpid()}:{code}\\n")
sys.exit(code)
"""


def start(folder: Path, actions: str) -> Command:
    return Command([sys.executable, "-c", PROGRAM.replace("ACTION_LIST", actions)], folder)


def starts(folder: Path) -> list[list[str]]:
    return [line.split("|") for line in (folder / "starts").read_text().splitlines()]


def test_killed_then_asking_then_done(tmp_path):
    command = start(tmp_path, "die, lambda: AGAIN, vanish, lambda: 0")
    assert command.wait() == 0, command.text
    found = starts(tmp_path)
    vanished = "Ray has ended, and its driver with it (exit code 1)"
    assert [again for _, again, _, _ in found] == ["None", "the driver was killed (SIGKILL)", "", vanished]
    assert len({launch for launch, *_ in found}) == 1
    assert {kept for _, _, kept, _ in found} == {"True"}
    assert len({pid for *_, pid in found} | {str(command.process.pid)}) == 5


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_an_end_is_an_end(code, tmp_path):
    command = start(tmp_path, f"lambda: {code}")
    assert command.wait() == code, command.text
    assert len(starts(tmp_path)) == 1


@pytest.mark.parametrize(("actions", "code"), [("die", 137), ("lambda: AGAIN", 2)])
def test_one_that_dies_at_once_is_given_up(actions, code, tmp_path):
    command = start(tmp_path, actions)
    assert command.wait() == code, command.text
    assert len(starts(tmp_path)) == 4


def test_ctrl_c_reaches_the_driver_once(tmp_path):
    command = start(tmp_path, "wait")
    assert command.wait_until((tmp_path / "ready").exists), command.text
    command.interrupt()
    assert command.wait() == 130, command.text
    assert len(starts(tmp_path)) == 1


def test_a_driver_does_not_outlive_who_looks_after_it(tmp_path):
    command = start(tmp_path, "wait")
    assert command.wait_until((tmp_path / "ready").exists), command.text
    driver = psutil.Process(int(starts(tmp_path)[0][-1]))
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait()
    driver.wait(timeout=60)
