"""Ranks of an attempt stop in the middle of a save, are taken for dead, and wake up when another attempt has gone on:
they change nothing any more."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import run_distributed, start_distributed
from tiny import recipe_for
from training import QuietMonitor

from ftlaunch.distributed import entry, run_directory
from ftlaunch.distributed.again import Flags
from ftlaunch.distributed.checkpoint.commit import list_commits
from ftlaunch.distributed.checkpoint.save import CheckpointWriter
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.distributed.saver import Saver
from ftlaunch.distributed.world import World
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

WAIT_S = 60.0

MOMENTS = {
    "weights": (CheckpointWriter, "_save_parts"),
    "commit record": (CheckpointWriter, "_commit"),
    "retention": (Saver, "_make_room"),
}


def stop_before(cls: type, name: str) -> None:
    """The whole process stops where it would do this for the first time, as on a machine that sleeps."""
    act = getattr(cls, name)

    def stopping(self: Any, *args: Any) -> Any:
        setattr(cls, name, act)
        # To this very thread: sent to the process, another one may take it, and this one gets on meanwhile.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return act(self, *args)

    setattr(cls, name, stopping)


def first(rank: int, size: int, recipe: dict[str, Any], folder: str, moment: str) -> tuple[str, str]:
    if rank == 0:
        stop_before(*MOMENTS[moment])
    return begin(rank, size, recipe, f"{folder}/first")


def second(rank: int, size: int, recipe: dict[str, Any], folder: str) -> tuple[str, str]:
    """On a host that cannot look the other attempt's process up, and when its last sign of life is long ago."""
    socket.gethostname = lambda: "another-host"
    run_directory.HEARTBEAT_DEAD_S = 0.0
    return begin(rank, size, recipe, f"{folder}/second")


def begin(rank: int, size: int, recipe: dict[str, Any], rendezvous: str) -> tuple[str, str]:
    loaded = LoadedRecipe(Recipe.model_validate(recipe), "test.yaml", (), ())
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    job = entry.Job(loaded, world, f"file://{rendezvous}", QuietMonitor(), ("test",), Flags())
    try:
        return entry.run_rank(job), ""
    except Exception as error:
        return type(error).__name__, str(error)


def wait_until_stopped(process: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.005)


def of_the_run(directory: Path) -> dict[str, bytes]:
    """All that the run is, but for what belongs to the first attempt alone, and the logs, which hold lines of both."""
    files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    alone = ("attempts/a1.", "metrics.jsonl", "events.jsonl")
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(alone)}


@pytest.mark.parametrize(
    ("moment", "mode", "on_error"),
    [
        ("weights", "async", "continue"),
        ("commit record", "sync", "stop"),
        ("retention", "async", "stop"),
    ],
)
def test_an_attempt_that_wakes_up_changes_nothing(tmp_path, moment, mode, on_error):
    """It would keep one checkpoint; the attempt that went on keeps all, and saves other steps. What it was writing has
    been cleared away, which is no failure that it may go on after."""
    old = {"every_steps": 3, "keep_last": 1, "mode": mode, "on_error": on_error}
    ranks = start_distributed(first, 2, recipe_for(tmp_path, checkpoint=old), str(tmp_path), moment, connect=False)
    wait_until_stopped(ranks.processes[0])
    new = {"every_steps": 2, "keep_last": 99, "mode": "sync"}
    endings = run_distributed(second, 2, recipe_for(tmp_path, checkpoint=new), str(tmp_path), connect=False)
    assert endings == [("finished", "")] * 2
    directory = tmp_path / "runs" / "tiny"
    before, lines = of_the_run(directory), (directory / "metrics.jsonl").read_text()
    os.kill(ranks.processes[0].pid, signal.SIGCONT)
    outcomes = [outcome.value for outcome in ranks.join(WAIT_S)]
    assert [kind for kind, _ in outcomes] == ["Superseded"] * 2, outcomes
    assert all("attempt 2 goes on with the run since" in text and "on another-host" in text for _, text in outcomes)
    assert of_the_run(directory) == before
    assert (directory / "metrics.jsonl").read_text().startswith(lines)
    records = list_commits(str(directory), pytest.fail)
    assert [record.step for record in records] == ([3, 4, 6, 8] if moment == "retention" else [2, 4, 6, 8])
    assert all(verify_checkpoint(str(directory / record.directory)) == [] for record in records)
    assert {path.name for path in directory.glob("step-*")} == {record.directory for record in records}
    assert "was taken for dead" in (directory / "attempts" / "a1.end.json").read_text()
