"""Saves that fail while the run goes on: a rank that others wait for in vain, a store that refuses a part. Training
goes on or stops, as the recipe says, and what was saved before stays whole."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy
from harness import run_distributed
from servers import moto_process
from tiny import recipe_for
from training import QuietMonitor

from ftlaunch.distributed import entry, storage, storage_retry
from ftlaunch.distributed import group as groups
from ftlaunch.distributed.checkpoint.commit import list_commits
from ftlaunch.distributed.checkpoint.save import CheckpointWriter
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import InfrastructureError
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

KEEP = {"every_steps": 2, "keep_last": 99, "keep_training_state": 99}
PATIENCE_S = 60.0
TIMEOUT_S = 5.0
"""Of ranks that wait for each other in a save; all else in a save of the small model takes a small part of it."""

Ending = tuple[str, str, list[str]]
"""How a rank ended, why, and what was said."""


class Listening(QuietMonitor):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def emit(self, event: Any) -> None:
        if event["kind"] == "message":
            self.messages.append(event["text"])


def train_as(rank: int, size: int, recipe: dict[str, Any], rendezvous: str) -> Ending:
    loaded, monitor = LoadedRecipe(Recipe.model_validate(recipe), "test.yaml", (), ()), Listening()
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    try:
        outcome = entry.run_rank(entry.Job(loaded, world, f"file://{rendezvous}", monitor, ("test",)))
    except InfrastructureError as error:
        return "InfrastructureError", str(error), monitor.messages
    return outcome, "", monitor.messages


def whole_steps(_rank: int, _size: int, run: str) -> tuple[list[int], list[str]]:
    """Committed steps, all of them whole; and what else lies in the run. In a process of its own: clients of object
    stores do not like to be forked."""
    records = list_commits(run, pytest.fail)
    assert all(verify_checkpoint(storage.join(run, record.directory)) == [] for record in records)
    known = {record.directory for record in records}
    return [record.step for record in records], [
        name for name in storage.list_names(run) if name.startswith("step-") and name not in known
    ]


def look(run: str) -> tuple[list[int], list[str]]:
    [found] = run_distributed(whole_steps, 1, run, connect=False)
    return found  # type: ignore[no-any-return]


# --- a rank that does not answer ------------------------------------------------------------------------------------


def hold(rank: int, folder: Path) -> None:
    """Rank 1 is at the files of step 4 until rank 0 has given it up."""
    groups.SAVE_TIMEOUT = timedelta(seconds=TIMEOUT_S)
    given_up, write, save = folder / "given-up", CheckpointWriter._save_small_files, CheckpointWriter.save

    def held(self: CheckpointWriter, directory: str, content: Any) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while rank == 1 and "step-000004" in directory and not given_up.exists():
            assert time.monotonic() < deadline, "the other rank waits for ever"
            time.sleep(0.01)
        return write(self, directory, content)

    def saving(self: CheckpointWriter, step: int, content: Any) -> Any:
        try:
            return save(self, step, content)
        except InfrastructureError:
            given_up.touch()
            raise

    CheckpointWriter._save_small_files, CheckpointWriter.save = held, saving


def train_held(rank: int, size: int, recipe: dict[str, Any], folder: str) -> Ending:
    hold(rank, Path(folder))
    return train_as(rank, size, recipe, f"{folder}/rendezvous")


@pytest.mark.parametrize(("mode", "on_error"), [("async", "continue"), ("sync", "stop")])
def test_ranks_do_not_wait_for_ever_for_one_that_is_stuck_in_a_save(tmp_path, mode, on_error):
    """After that they are connected anew, so that later saves succeed."""
    recipe = recipe_for(tmp_path, checkpoint={**KEEP, "mode": mode, "on_error": on_error})
    endings = run_distributed(train_held, 2, recipe, str(tmp_path), connect=False)
    run = str(tmp_path / "runs" / "tiny")
    if on_error == "stop":
        assert [ending[0] for ending in endings] == ["InfrastructureError"] * 2
        assert all("the connection to another rank broke during a save" in ending[1] for ending in endings)
        assert look(run) == ([2], [])
        endings = run_distributed(train_as, 2, recipe, str(tmp_path / "again"), connect=False)
        assert look(run) == ([2, 4, 6, 8], [])
    else:
        (said,) = [text for text in endings[0][2] if "was not saved" in text]
        assert "step 4 was not saved: the connection to another rank broke during a save" in said
        assert "Training goes on; the newest checkpoint is that of step 2" in said
        assert look(run) == ([2, 6, 8], [])
    assert [ending[0] for ending in endings] == ["finished"] * 2


# --- a store that refuses -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an S3 server with a bucket."""
    with moto_process(tmp_path_factory.mktemp("moto")) as port:
        bucket = urllib.request.Request(f"http://127.0.0.1:{port}/failing", method="PUT")
        urllib.request.urlopen(bucket).close()
        yield port


@pytest.fixture
def proxy(store: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    found = FaultyProxy("127.0.0.1", store)
    settings = {"ENDPOINT_URL": found.url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    for name, value in {**settings, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(storage_retry.RetryPolicy, "wait_s", lambda self, attempt, asked_for_s=0.0: 0.001)
    yield found
    found.stop()


REFUSED: dict[str, Callable[[str, str], bool]] = {
    "a part": lambda method, path: method == "PUT" and "partNumber=" in path and "step-000004" in path,
    "the completion": lambda method, path: method == "POST" and "uploadId=" in path and "step-000004" in path,
}


@pytest.mark.parametrize(
    ("what", "mode", "on_error"),
    [
        ("a part", "async", "continue"),
        ("the completion", "sync", "continue"),
        ("a part", "sync", "stop"),
        ("the completion", "async", "stop"),
    ],
)
def test_a_store_that_fails_in_mid_run(tmp_path, proxy, what, mode, on_error):
    where = f"s3://failing/{what.replace(' ', '-')}-{on_error}"
    recipe = recipe_for(tmp_path, checkpoint={**KEEP, "path": where, "mode": mode, "on_error": on_error})
    proxy.applies, proxy.rates = REFUSED[what], {"error": 1.0}
    endings = run_distributed(train_as, 2, recipe, str(tmp_path / "rendezvous"), connect=False)
    assert proxy.counts["error"] > 0
    proxy.calm()
    run = f"{where}/tiny"
    if on_error == "stop":
        assert [ending[0] for ending in endings] == ["InfrastructureError"] * 2, endings
        assert all("step-000004.a1" in ending[1] for ending in endings), endings
        assert look(run) == ([2], [])
        endings = run_distributed(train_as, 2, recipe, str(tmp_path / "again"), connect=False)
        assert look(run) == ([2, 4, 6, 8], [])
    else:
        (said,) = [text for text in endings[0][2] if "was not saved" in text]
        assert "step 4 was not saved" in said and "step-000004.a1" in said
        assert look(run) == ([2, 6, 8], [])
    assert [ending[0] for ending in endings] == ["finished"] * 2, endings
    bucket = urllib.request.urlopen(f"http://127.0.0.1:{proxy.port}/failing?uploads").read()
    assert b"<UploadId>" not in bucket, "what a failed save has sent is not paid for"
