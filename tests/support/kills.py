"""A run that is killed in one save after another, and what is looked at after each kill."""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Ranks, run_distributed
from peft import PeftModel
from safetensors.torch import load
from save_phases import PHASES, Marks, watch
from slow_disk import slow_down
from training import QuietMonitor
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import entry, storage
from ftlaunch.distributed.checkpoint import shared
from ftlaunch.distributed.checkpoint.commit import list_commits
from ftlaunch.distributed.checkpoint.layout import MAX_FILE_BYTES
from ftlaunch.distributed.checkpoint.manifest import MANIFEST_NAME, read_manifest
from ftlaunch.distributed.checkpoint.save import CheckpointWriter
from ftlaunch.distributed.checkpoint.verify import verify_checkpoint
from ftlaunch.distributed.world import World
from ftlaunch.recipes.load import LoadedRecipe
from ftlaunch.recipes.schema import Recipe

WAIT_S = 120.0
"""No start and no save takes as long; who waits longer has found a hang."""


@dataclass(frozen=True)
class Medium:
    """What checkpoints are written to: "local disk", whose files all ranks fill together; "shared disk", a file system
    of a network, whose files have one owner each that the other ranks send to; or "S3", where it is the same."""

    name: str
    bytes_per_s: float = 1e9
    """Of each rank's disk. (S3 is slow by itself: `slow_link.py`.)"""
    pause_s: float = 0.0
    """Of each call that changes names, or waits for the disk; twice that for the copy of a part."""
    max_file_bytes: int = MAX_FILE_BYTES

    @property
    def phases(self) -> tuple[str, ...]:
        """Those that a save on it has."""
        return tuple(phase for phase in PHASES[1:] if phase != "exchange" or self.name != "local disk")


class Listening(QuietMonitor):
    """Writes down where training begins, and what is said about checkpoints."""

    def __init__(self, said: Path) -> None:
        self._said = said

    def emit(self, event: Any) -> None:
        if event["kind"] == "step":
            self._note(f"step {event['step']}")
        if event["kind"] == "message" and event["level"] == "warning":
            self._note(event["text"])

    def _note(self, text: str) -> None:
        with self._said.open("a") as out:
            out.write(text + "\n")


def plain_rank(rank: int, size: int, recipe: dict[str, Any], folder: str, medium: Medium) -> str:
    """One rank's program, which nobody slows down or disturbs."""
    entry.CheckpointWriter = partial(CheckpointWriter, max_file_bytes=medium.max_file_bytes)
    if medium.name == "shared disk":
        shared.file_system = lambda _: "nfs4"
    loaded = LoadedRecipe(Recipe.model_validate(recipe), "test.yaml", (), ())
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    monitor = Listening(Path(folder) / "said.txt") if rank == 0 else QuietMonitor()
    return entry.run_rank(entry.Job(loaded, world, f"file://{folder}/rendezvous", monitor, ("test",)))


def watched_rank(rank: int, size: int, recipe: dict[str, Any], folder: str, medium: Medium, marks: Marks) -> str:
    """The same on a slow medium, which it does not know of."""
    watch(marks, rank, 2 * medium.bytes_per_s, copy_s=2 * medium.pause_s)
    slow_down(medium.bytes_per_s, medium.pause_s)
    return plain_rank(rank, size, recipe, folder, medium)


@dataclass(frozen=True)
class Aim:
    """Where a kill is to fall: in a phase of the attempt's nth save, behind this share of it. `victim` None: all."""

    save: int
    phase: str
    share: float
    victim: int | None


def draw_aims(rng: random.Random, medium: Medium, ranks: int, count: int) -> list[Aim]:
    """Every phase as often, in random order; one rank or all."""
    phases = [medium.phases[number % len(medium.phases)] for number in range(count)]
    rng.shuffle(phases)
    victims = [*range(ranks), *[None] * ranks]
    return [Aim(rng.choice((1, 1, 2)), phase, rng.random(), rng.choice(victims)) for phase in phases]


@dataclass(frozen=True)
class Kill:
    """What happened. `phase`: the one aimed at if a rank was in it, else that of rank 0."""

    mode: str
    aimed_at: str
    phase: str
    phases: list[str]
    victim: str
    save: int
    age_s: float


def strike(ranks: Ranks, marks: Marks, aim: Aim, mode: str) -> Kill:
    """Wait for the moment, kill, and see the others end by themselves."""
    deadline = time.monotonic() + WAIT_S
    while not _is_there(marks, aim):
        assert time.monotonic() < deadline, f"never reached {aim}: {marks.phases()}"
        assert all(process.is_alive() for process in ranks.processes), ranks.join(WAIT_S)
        time.sleep(0.0003)
    time.sleep(aim.share * marks.usual_s(aim.phase))
    phases = marks.phases()
    saves, age_s = marks.saves(), marks.age_s()
    victims = range(len(phases)) if aim.victim is None else [aim.victim]
    for rank in victims:
        ranks.kill(rank)
    outcomes = ranks.join(WAIT_S, grace_s=WAIT_S / 2)
    assert all(outcome.error for outcome in outcomes), outcomes
    assert not any("was still running" in outcome.error for outcome in outcomes), outcomes
    phase = aim.phase if aim.phase in phases else phases[0]
    victim = "all ranks" if aim.victim is None else f"rank {aim.victim}"
    return Kill(mode, aim.phase, phase, phases, victim, saves, age_s)


def _is_there(marks: Marks, aim: Aim) -> bool:
    saves = marks.saves()
    return saves > aim.save or (saves == aim.save and aim.phase in marks.phases())


# --- what is left ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """The newest committed checkpoint after a kill; step 0: none yet."""

    step: int = 0
    directory: str = ""
    files: int = 0
    bytes: int = 0
    committed: list[int] = field(default_factory=list)


def look(run_url: str, base: str, *, is_adapter: bool) -> Left:
    """Every committed checkpoint is whole, byte by byte; the newest can be resumed, and opened. In a process of its
    own: clients of object stores do not like to be forked."""
    [left] = run_distributed(_look, 1, run_url, base, is_adapter, connect=False)
    return left  # type: ignore[no-any-return]


def _look(_rank: int, _size: int, run_url: str, base: str, is_adapter: bool) -> Left:
    records = list_commits(run_url, refuse)
    for record in records:
        problems = verify_checkpoint(storage.join(run_url, record.directory))
        assert not problems, problems
    if not records:
        return Left()
    newest = records[-1]
    directory = storage.join(run_url, newest.directory)
    manifest = read_manifest(directory)
    assert manifest.is_resumable
    check_opens(directory, [file.path for file in manifest.files], base, is_adapter=is_adapter)
    size = sum(file.size for file in manifest.files)
    return Left(newest.step, newest.directory, len(manifest.files), size, [record.step for record in records])


def refuse(line: str) -> None:
    """Nothing about a checkpoint is to be reported."""
    raise AssertionError(line)


def check_opens(directory: str, paths: list[str], base: str, *, is_adapter: bool) -> None:
    """`from_pretrained` takes the checkpoint, and the model has the very values of its files."""
    with tempfile.TemporaryDirectory() as copy:
        tensors: dict[str, torch.Tensor] = {}
        for path in (path for path in paths if "/" not in path):
            data = storage.read_bytes(storage.join(directory, path))
            (Path(copy) / path).write_bytes(data)
            tensors |= load(data) if path.endswith(".safetensors") else {}
        assert tensors
        model = AutoModelForCausalLM.from_pretrained(base if is_adapter else copy, dtype="auto")
        if is_adapter:
            model = PeftModel.from_pretrained(model, copy)
        held = {name.replace(".default.", "."): value for name, value in model.state_dict().items()}
        assert all(torch.equal(held[name], value.to(held[name].dtype)) for name, value in tensors.items())


def contents(run_url: str) -> dict[str, bytes]:
    """The files of the newest committed checkpoint, but for the manifest, which names the attempt."""
    [files] = run_distributed(_contents, 1, run_url, connect=False)
    return files  # type: ignore[no-any-return]


def _contents(_rank: int, _size: int, run_url: str) -> dict[str, bytes]:
    directory = storage.join(run_url, list_commits(run_url, refuse)[-1].directory)
    paths = [file.path for file in read_manifest(directory).files]
    return {path: storage.read_bytes(storage.join(directory, path)) for path in paths if path != MANIFEST_NAME}


def metrics(run_url: str) -> list[dict[str, Any]]:
    """What the run wrote down."""
    [lines] = run_distributed(_metrics, 1, run_url, connect=False)
    return lines  # type: ignore[no-any-return]


def _metrics(_rank: int, _size: int, run_url: str) -> list[dict[str, Any]]:
    files = sorted(name for name in storage.list_names(run_url) if name.startswith("metrics"))
    texts = [storage.read_bytes(storage.join(run_url, name)).decode() for name in files]
    return [json.loads(line) for text in texts for line in text.splitlines()]
