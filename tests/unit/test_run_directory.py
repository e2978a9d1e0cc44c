"""The run directory: attempts, who is alive, what is fixed at the first start."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import psutil
import pytest

from ftlaunch.distributed.pulse import Pulse
from ftlaunch.distributed.run_directory import (
    HEARTBEAT_DEAD_S,
    AttemptInfo,
    Process,
    RunDirectory,
)
from ftlaunch.recipes.errors import InfrastructureError, Superseded, UserError


class Clock:
    def __init__(self):
        self.time = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self):
        return self.time

    def advance(self, seconds):
        self.time += timedelta(seconds=seconds)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def run(tmp_path, clock):
    return RunDirectory(str(tmp_path / "bot"), clock)


def claim(run, process=None):
    return run.claim_attempt(world_size=2, command=["ftlaunch", "recipe.yaml"], process=process)


ELSEWHERE = Process("another-host", 1, 0.0)
GONE = Process(socket.gethostname(), os.getpid(), 12345.0)  # our pid, but of a process that started long ago


def test_attempts_are_numbered_and_kept(run):
    assert [claim(run), claim(run), claim(run)] == [1, 2, 3]
    first = run.attempts()[0]
    assert first == AttemptInfo(1, Process.this(), "2030-01-01T00:00:00+00:00", 2, ("ftlaunch", "recipe.yaml"))


def test_claims_at_once_get_a_number_each(run):
    processes = [Process("host", pid, 0.0) for pid in range(8)]
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda process: claim(run, process), processes))
    assert sorted(numbers) == list(range(1, 9))
    assert {attempt.number: attempt.process.pid for attempt in run.attempts()} == {
        number: process.pid for number, process in zip(numbers, processes, strict=True)
    }


def test_alive_on_this_host_is_what_has_the_same_start_time(run):
    claim(run, GONE)
    assert run.live_attempt() is None
    number = claim(run)
    assert run.live_attempt().number == number
    run.finish_attempt(number, "interrupted", "Ctrl-C")
    assert run.live_attempt() is None


def test_a_killed_process_is_not_alive(run):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        claim(run, Process(socket.gethostname(), child.pid, psutil.Process(child.pid).create_time()))
        assert run.live_attempt().process.pid == child.pid
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the process table
        assert run.live_attempt() is None
    assert run.live_attempt() is None


def test_alive_elsewhere_is_what_still_beats(run, clock):
    number = claim(run, ELSEWHERE)
    clock.advance(HEARTBEAT_DEAD_S - 1)
    assert run.live_attempt().number == number
    run.heartbeat(number, step=7)
    clock.advance(HEARTBEAT_DEAD_S - 1)
    assert run.live_attempt().number == number
    clock.advance(1)
    assert run.live_attempt() is None


def test_an_older_attempt_that_lives_is_seen_behind_a_newer_one_that_ended(run):
    older, newer = claim(run, ELSEWHERE), claim(run, ELSEWHERE)
    run.finish_attempt(newer, "failed", "out of memory")
    assert run.live_attempt().number == older
    assert [attempt.number for attempt in run.live_attempts()] == [older]


def test_an_attempt_beats_while_it_takes_no_step(run, tmp_path):
    """Indexing, loading, saving: somebody on another host must not take it for dead."""
    path = tmp_path / "bot/attempts/a1.heartbeat"
    pulse = Pulse(run, 1, every_s=0.001)
    while not path.exists():
        os.sched_yield()
    pulse.step = 3
    while json.loads(path.read_bytes())["step"] != 3:
        os.sched_yield()
    pulse.close()
    assert not any(thread.name == "pulse" for thread in threading.enumerate())


def test_a_beat_that_storage_refuses_is_followed_by_others(run, tmp_path, monkeypatch):
    beats = []

    def refuse_once(attempt, step):
        beats.append(step)
        if len(beats) == 1:
            raise InfrastructureError("the disk is away")

    monkeypatch.setattr(run, "heartbeat", refuse_once)
    pulse = Pulse(run, 1, every_s=0.001)
    while len(beats) < 2:
        os.sched_yield()
    pulse.close()


def test_the_first_word_about_an_end_counts(run, tmp_path):
    run.finish_attempt(1, "failed", "first")
    run.finish_attempt(1, "finished")
    end = json.loads((tmp_path / "bot/attempts/a1.end.json").read_bytes())
    assert (end["outcome"], end["message"]) == ("failed", "first")


def test_status(run):
    assert run.status() == "new"
    run.store_recipe("name: bot\n")
    assert run.status() == "unfinished"
    number = claim(run)
    assert run.status() == "alive"
    run.finish_attempt(number, "finished")
    assert run.status() == "unfinished"
    run.write_result({"steps": 10})
    assert run.status() == "finished"
    assert run.read_result() == {"steps": 10}


def test_the_recipe_of_the_first_start_stays_until_changes_are_accepted(run, tmp_path):
    assert run.read_recipe() is None
    run.store_recipe("a: 1\n")
    run.store_recipe("a: 2\n")
    assert run.read_recipe() == "a: 1\n"
    run.replace_recipe("a: 3 # ü\n", attempt=2)
    run.replace_recipe("a: 4\n", attempt=2)
    assert run.read_recipe() == "a: 4\n"
    assert (tmp_path / "bot/recipe.a2.yaml").read_text() == "a: 1\n"


def test_facts_are_fixed_once(run):
    assert run.read_facts() is None
    assert run.record_facts({"streams": 16}) == {"streams": 16}
    assert run.record_facts({"streams": 32}) == {"streams": 16}
    assert run.read_facts() == {"streams": 16}


def test_a_broken_file_is_named(run, tmp_path):
    run.record_facts({})
    (tmp_path / "bot/facts.json").write_text("{")
    with pytest.raises(UserError, match=r"facts\.json is broken"):
        run.read_facts()


def test_an_attempt_is_superseded_once_another_is_registered(run):
    first = run.claim_attempt(world_size=1, command=["x"])
    run.check_newest(first)
    second = run.claim_attempt(world_size=2, command=["x"])
    run.check_newest(second)
    third = run.claim_attempt(world_size=2, command=["x"])
    for attempt in (first, second):
        with pytest.raises(Superseded, match=f"attempt {attempt} of .*attempt {third} goes on with the run since 2030"):
            run.check_newest(attempt)


def test_events_carry_time_and_attempt(run, clock, tmp_path):
    events = run.open_events(attempt=3)
    events.record("started", world_size=2)
    clock.advance(1.5)
    events.record("checkpoint_committed", step=5)
    events.close()
    lines = [json.loads(line) for line in (tmp_path / "bot/events.jsonl").read_text().splitlines()]
    assert lines == [
        {"time": "2030-01-01T00:00:00.000+00:00", "attempt": 3, "event": "started", "world_size": 2},
        {"time": "2030-01-01T00:00:01.500+00:00", "attempt": 3, "event": "checkpoint_committed", "step": 5},
    ]


def test_check_accepts_a_new_place_and_a_run(run, tmp_path):
    run.check()
    run.store_recipe("")
    run.check()
    assert [path.name for path in (tmp_path / "bot").iterdir()] == ["recipe.yaml"]


def test_check_refuses_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"is no run: it holds thesis\.tex"):
        RunDirectory(str(tmp_path)).check()


def test_check_refuses_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunDirectory(str(tmp_path / "file" / "bot")).check()


def test_the_environment_is_described_without_importing_it(run, tmp_path):
    program = (
        "import sys; from ftlaunch.distributed.run_directory import describe_environment;"
        "print(sorted(describe_environment()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "['machine', 'packages', 'platform', 'python'] False"
    run.write_environment()
    packages = json.loads((tmp_path / "bot/environment.json").read_bytes())["packages"]
    assert packages == {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    assert packages["torch"]
