"""Checkpoints that are written while training goes on: the same bytes, the same losses, and no failure that is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from harness import run_distributed
from processes import Command, rank_alone
from tiny import recipe_for, write_recipe
from training import QuietMonitor, read_run, train_all

from ftlaunch.distributed import entry
from ftlaunch.distributed.checkpoint import save as save_module
from ftlaunch.distributed.checkpoint.commit import list_commits
from ftlaunch.distributed.checkpoint.peers import Peers
from ftlaunch.distributed.checkpoint.reader import CheckpointReader, read_whole
from ftlaunch.distributed.checkpoint.save import CheckpointWriter
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.distributed.saver import Saver
from ftlaunch.distributed.world import World
from ftlaunch.recipes.errors import InfrastructureError, Interrupted, UserError
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

PATIENCE_S = 60.0
KEEP = {"keep_last": 99, "keep_training_state": 99}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved(run: Path) -> dict[str, dict[str, bytes]]:
    return {folder.name: contents(folder) for folder in sorted(run.glob("step-*"))}


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {"model": {"dtype": "float32"}}),
        (2, {"model": {"dtype": "bfloat16"}}),
        (3, {"strategy": {"type": "ddp"}, "model": {"dtype": "float32"}}),
        (2, {"adapter": {"type": "lora", "rank": 3}, "train": {"learning_rate": 1e-2}}),
    ],
)
def test_async_and_sync_write_the_same_bytes_and_train_alike(tmp_path, size, changes):
    """With a save after every step the next step changes weights while the last one's are written."""
    keep = {"every_steps": 1, **KEEP}
    recipes = [
        recipe_for(tmp_path, name=mode, checkpoint={**keep, "mode": mode}, **changes) for mode in ("sync", "async")
    ]
    waiting, beside = train_all(recipes, size)
    assert beside.losses == waiting.losses
    assert beside.grad_norms == waiting.grad_norms
    assert len(saved(waiting.directory)) == 8
    assert saved(beside.directory) == saved(waiting.directory)
    for run in (waiting, beside):
        lines = [line for line in run.lines if line["kind"] == "checkpoint"]
        assert [line["step"] for line in lines] == list(range(1, 9))
        assert all(0 < line["save_stall_s"] <= line["seconds"] for line in lines)


# --- what happens meanwhile -----------------------------------------------------------------------------------------


class Watch(QuietMonitor):
    """Counts steps, and may ask to stop after one."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.step = 0
        self.messages: list[str] = []

    def emit(self, event):
        if event["kind"] == "step":
            self.step = event["step"]
        if event["kind"] == "message":
            self.messages.append(event["text"])

    def stop_requested(self) -> bool:
        return self.stop_after is not None and self.step >= self.stop_after


def hold_saves(monitor: Watch, ahead: int) -> list[int]:
    """No save ends before training is `ahead` steps further (on rank 0, which counts them); how many run at once."""
    save, running, most = CheckpointWriter.save, [], [0]
    lock = threading.Lock()

    def held(self, step, content):
        with lock:
            running.append(step)
            most[0] = max(most[0], len(running))
        deadline = time.monotonic() + PATIENCE_S
        while self.peers.rank == 0 and content.copied and monitor.step < step + ahead:
            assert time.monotonic() < deadline, "training does not go on during a save"
            time.sleep(0.005)
        try:
            return save(self, step, content)
        finally:
            running.remove(step)

    CheckpointWriter.save = held
    return most


def break_saves(rank: int, victim: int, steps: set[int]) -> None:
    """The storage of one rank fails when these steps are saved."""
    size_problems = save_module.size_problems

    def failing(directory, files):
        if rank == victim and any(f"step-{step:06d}" in directory for step in steps):
            raise InfrastructureError(f"cannot read {directory}: Input/output error")
        return size_problems(directory, files)

    save_module.size_problems = failing


def only_these_are_late(rank: int, late_ranks: tuple[int, ...]) -> None:
    is_late = Saver.is_late
    Saver.is_late = lambda self: rank in late_ranks and is_late(self)


def run_one(rank, size, recipe, folder, *, ahead=None, broken=(), victim=0, stop_after=None, late_ranks=None):
    """Train one recipe under these conditions: how it ended, what was said, and how many saves ran at once."""
    monitor = Watch(stop_after if rank == 0 else None)
    most = hold_saves(monitor, ahead) if ahead is not None else [0]
    break_saves(rank, victim, set(broken))
    if late_ranks is not None:
        only_these_are_late(rank, late_ranks)
    loaded = LoadedRecipe(Recipe.model_validate(recipe), "test.yaml", (), ())
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    try:
        outcome = entry.run_rank(entry.Job(loaded, world, f"file://{folder}/rendezvous", monitor, ("test",)))
    except Exception as error:
        return type(error).__name__, str(error), monitor.messages, most[0]
    return outcome, "", monitor.messages, most[0]


def run(tmp_path, size, checkpoint, *, inputs=None, **more):
    """Train in a folder, on its own model and data or on those of `inputs`."""
    changes = more.pop("changes", {})
    tmp_path.mkdir(exist_ok=True)
    place = {"path": str(tmp_path / "runs")}
    recipe = recipe_for(inputs or tmp_path, checkpoint={"mode": "async", **KEEP, **place, **checkpoint}, **changes)
    endings = run_distributed(_run_one, size, recipe, str(tmp_path), more, connect=False)
    return endings, tmp_path / "runs" / "tiny"


def _run_one(rank, size, recipe, folder, more):
    return run_one(rank, size, recipe, folder, **more)


def steps_of(directory: Path) -> list[int]:
    records = list_commits(str(directory), pytest.fail)
    assert all(verify_checkpoint(str(directory / record.directory)) == [] for record in records)
    return [record.step for record in records]


def test_training_goes_on_and_the_next_save_waits(tmp_path):
    endings, directory = run(tmp_path, 2, {"every_steps": 3}, ahead=2)
    assert [ending[0] for ending in endings] == ["finished"] * 2
    assert steps_of(directory) == [3, 6, 8]
    assert [ending[3] for ending in endings] == [1, 1]
    (plain,) = train_all([recipe_for(tmp_path, name="plain", checkpoint={"mode": "sync", **KEEP})], 2)
    assert saved(directory) == saved(plain.directory)


def send_nothing(self, data, to):
    raise AssertionError(f"{len(data)} bytes are sent to rank {to}")


def run_without_sending(rank, size, recipe, folder):
    Peers.send = send_nothing
    return run_one(rank, size, recipe, folder)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_ranks_of_one_host_send_each_other_nothing(tmp_path, mode):
    recipe = recipe_for(tmp_path, checkpoint={"mode": mode})
    endings = run_distributed(run_without_sending, 3, recipe, str(tmp_path), connect=False)
    assert [ending[0] for ending in endings] == ["finished"] * 3
    assert verify_checkpoint(str(read_run(tmp_path / "runs" / "tiny").checkpoint)) == []


def test_an_interrupt_waits_for_the_save_that_goes_on(tmp_path):
    """The save of step 3 cannot end before step 4, after which the run is asked to stop."""
    endings, directory = run(tmp_path, 2, {"every_steps": 3}, ahead=1, stop_after=4)
    assert [ending[0] for ending in endings] == [Interrupted.__name__] * 2
    last = read_run(directory).steps[-1]["step"]
    assert last in (5, 6)
    assert steps_of(directory) == sorted({3, last})


def test_a_mistake_in_training_leaves_the_save_that_goes_on_whole(tmp_path):
    changes = {"train": {"learning_rate": 1e30, "max_grad_norm": None, "max_steps": 8}}
    endings, directory = run(tmp_path, 2, {"every_steps": 1}, changes=changes)
    assert [ending[0] for ending in endings] == [UserError.__name__] * 2
    assert "the loss is" in endings[0][1]
    steps = [line["step"] for line in read_run(directory).steps]
    assert steps_of(directory) == steps != []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_save_that_fails_stops_every_rank_and_says_why(tmp_path, victim):
    endings, directory = run(tmp_path, 2, {"every_steps": 2}, broken={4}, victim=victim)
    assert [ending[0] for ending in endings] == [InfrastructureError.__name__] * 2
    assert all("Input/output error" in ending[1] for ending in endings)
    assert steps_of(directory) == [2]
    ends = json.loads((directory / "attempts" / "a1.end.json").read_text())
    assert ends["outcome"] == "failed"
    assert "Input/output error" in ends["message"]


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_training_goes_on_after_a_save_that_fails_where_that_is_wanted(tmp_path, mode):
    endings, directory = run(
        tmp_path, 2, {"every_steps": 2, "mode": mode, "on_error": "continue"}, broken={4}, victim=1
    )
    assert [ending[0] for ending in endings] == ["finished"] * 2
    assert steps_of(directory) == [2, 6, 8]
    (said,) = [text for text in endings[0][2] if "was not saved" in text]
    assert "step 4 was not saved" in said
    assert "Input/output error" in said
    assert "the newest checkpoint is that of step 2" in said


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_the_last_save_must_not_fail(tmp_path, mode):
    endings, directory = run(
        tmp_path, 2, {"every_steps": 3, "mode": mode, "on_error": "continue"}, broken={8}, victim=1
    )
    assert [ending[0] for ending in endings] == [InfrastructureError.__name__] * 2
    assert steps_of(directory) == [3, 6]


# --- cadence and retention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_saves_are_due_by_the_clock_of_rank_0(tmp_path, mode):
    """The other rank's clock never says so; a step takes longer than a ten-millionth of a minute."""
    checkpoint = {"every_steps": None, "every_minutes": 1e-7, "mode": mode}
    endings, directory = run(tmp_path, 2, checkpoint, late_ranks=(0,))
    assert [ending[0] for ending in endings] == ["finished"] * 2
    assert steps_of(directory) == list(range(1, 9))
    _, directory = run(tmp_path / "other", 2, checkpoint, late_ranks=(1,))
    assert steps_of(directory) == [8]


def test_hours_pass_between_saves_by_the_clock(tmp_path):
    _, directory = run(tmp_path, 1, {"every_steps": None, "every_minutes": 600})
    assert steps_of(directory) == [8]


def test_what_is_kept(tmp_path):
    """Multiples of 3, the two best, the last two; only the newest with its training state."""
    keep = {"keep_last": 2, "keep_every": 3, "keep_best": 2, "keep_training_state": 1}
    _, directory = run(tmp_path, 1, {"every_steps": 1, **keep}, changes={"evaluate": {"every_steps": 1}})
    losses = {
        line["step"]: line["losses"]["chats/loss"]
        for line in read_run(directory).lines
        if line["kind"] == "evaluation" and line["step"]
    }
    best = sorted(losses, key=lambda step: (losses[step], step))[:2]
    assert steps_of(directory) == sorted({3, 6, 7, 8, *best})
    assert [path.parent.name for path in directory.glob("*/training")] == ["step-000008.a1"]


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """Two runs on two ranks that save after every second step: "tiny" was stopped behind step 5, "plain" was not."""
    folder = tmp_path_factory.mktemp("halfway")
    run(folder, 2, {"every_steps": 2}, stop_after=5)
    train_all([recipe_for(folder, name="plain", checkpoint={"every_steps": 2})], 2)
    return folder


def assert_ends_as_plain(halfway, directory):
    ours, theirs = (contents(read_run(place).checkpoint) for place in (directory, halfway / "runs" / "plain"))
    del ours["MANIFEST.json"], theirs["MANIFEST.json"]  # it names the attempt
    assert ours == theirs


@pytest.mark.parametrize(("keep", "is_cut"), [(1, False), (2, False), (2, True)])
def test_a_run_goes_on_from_the_newest_training_state_that_is_whole(halfway, tmp_path, keep, is_cut):
    """The newest checkpoint lost a file, or the end of one. Automatically the one before is taken, if it kept its
    training state, and the run ends with the weights it would have had; weights alone are no place to go on from."""
    checkpoint = {"every_steps": 2, "keep_training_state": keep}
    run(tmp_path, 2, checkpoint, inputs=halfway, stop_after=5)
    directory = tmp_path / "runs" / "tiny"
    newest = read_run(directory).checkpoint
    harmed = newest / "training" / "exp_avg.safetensors"
    if is_cut:
        os.truncate(harmed, harmed.stat().st_size - 1)
    else:
        harmed.unlink()
    (tmp_path / "rendezvous").unlink()
    endings, _ = run(tmp_path, 2, checkpoint, inputs=halfway)
    before = max(step for step in (2, 4, 6) if step < int(newest.name[5:11]))
    if keep == 1:
        assert [ending[0] for ending in endings] == [UserError.__name__] * 2
        assert f"that of step {before} holds its weights only" in endings[1][1]
        return
    assert [ending[0] for ending in endings] == ["finished"] * 2
    assert any(f"{newest.name}/training/exp_avg.safetensors" in text for text in endings[0][2])
    assert_ends_as_plain(halfway, directory)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_layers_that_are_not_trained_are_written_once(tmp_path, mode):
    changes = {"model": {"train_layers": ["model.layers.2.*", "lm_head*"], "dtype": "bfloat16"}}
    endings, directory = run(tmp_path, 2, {"every_steps": 3, "mode": mode}, changes=changes)
    assert [ending[0] for ending in endings] == ["finished"] * 2
    assert steps_of(directory) == [3, 6, 8]
    names = [{path.stat().st_ino: path.name for path in folder.glob("model*")} for folder in directory.glob("step-*")]
    (shared,) = set(names[0]) & set(names[1]) & set(names[2])
    weights = CheckpointReader(str(read_run(directory).checkpoint))
    (file,) = {file.name for name, (file, _) in weights.files.places.items() if name.startswith("model.layers.0.")}
    assert file == names[0][shared]
    base = CheckpointReader(str(tmp_path / "model"))
    frozen = [name for name in weights.names() if not name.startswith(("model.layers.2.", "lm_head"))]
    assert all(torch.equal(read_whole(weights, n), read_whole(base, n).bfloat16()) for n in frozen)
    trained = [name for name in weights.names() if name not in frozen]
    assert not any(torch.equal(read_whole(weights, n), read_whole(base, n).bfloat16()) for n in trained)


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "place"),
    [("model.safetensors", 0.9), ("training/exp_avg_sq.safetensors", 0.01), ("training/state.json", 0.5)],
)
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_taken(halfway, tmp_path, file, place):
    """One rank or both may read the bit; both go back, and end with the weights they would have had."""
    shutil.copytree(halfway / "runs" / "tiny", tmp_path / "runs" / "tiny")
    directory = tmp_path / "runs" / "tiny"
    newest = read_run(directory).checkpoint
    flip(newest / file, place)
    endings, _ = run(tmp_path, 2, {"every_steps": 2}, inputs=halfway)
    assert [ending[0] for ending in endings] == ["finished"] * 2
    assert any(f"{newest}/{file}: bytes" in text for text in endings[0][2])
    step, before = int(newest.name[5:11]), max(step for step in (2, 4, 6) if step < int(newest.name[5:11]))
    assert f"checkpoint of step {step} is set aside: going on from that of step {before}" in endings[0][2]
    assert newest.exists()
    assert (directory / "commits" / f"{newest.name}.damaged.json").exists()
    assert steps_of(directory) == sorted({2, 4, 6, 8})  # an interrupted step that is no multiple was the damaged one
    assert_ends_as_plain(halfway, directory)


def test_a_flipped_bit_without_an_earlier_checkpoint_stops_the_run(tmp_path):
    run(tmp_path, 2, {"every_steps": None}, stop_after=3)
    directory = tmp_path / "runs" / "tiny"
    newest = read_run(directory).checkpoint
    flip(newest / "training" / "exp_avg.safetensors", 0.7)
    (tmp_path / "rendezvous").unlink()
    endings, _ = run(tmp_path, 2, {"every_steps": None})
    assert [ending[0] for ending in endings] == [UserError.__name__] * 2
    assert all("exp_avg.safetensors: bytes" in ending[1] and "--fresh" in ending[1] for ending in endings)
    assert len(list((directory / "commits").glob("*.json"))) == 1


def test_sigterm_saves_and_ends_with_130(tmp_path):
    """The emergency save comes after the one that may be on its way, and is the newest."""
    train = {"max_steps": 100_000, "lr_scheduler": "constant"}
    recipe = recipe_for(tmp_path, train=train, checkpoint={"every_steps": 1, "mode": "async", "keep_last": 3})
    path = str(write_recipe(tmp_path / "tiny.yaml", recipe))
    command = Command(rank_alone(path), tmp_path)
    directory = tmp_path / "runs" / "tiny"
    assert command.wait_until(lambda: len(list(directory.glob("commits/*.json"))) >= 2)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 130, command.text
    steps = steps_of(directory)
    assert steps[-1] == max(line["step"] for line in read_run(directory).steps)
    assert not [path for path in directory.glob("step-*") if int(path.name[5:11]) not in steps]
