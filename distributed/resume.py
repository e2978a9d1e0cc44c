"""Filling an engine from the newest checkpoint that proves whole when it is read: every byte that a rank takes is held
against the checksums of the save. A damaged one is named, set aside, and the one before it is taken."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..recipes.errors import UserError
from .attempt import Attempt
from .checkpoint.commit import CommitRecord, latest_resumable, set_aside
from .checkpoint.manifest import DamagedError
from .group import Group
from .metrics import Recorder
from .model import BuiltModel
from .node_share import shared_on_node
from .saver import load_parts, read_state
from .strategies.base import Engine


def load_newest(
    engine: Engine, built: BuiltModel, attempt: Attempt, group: Group, recorder: Recorder | None
) -> dict[str, Any] | None:
    """Weights, masters, optimizer; returns the state to continue from, or None for a run without a checkpoint.

    Collective. Raises UserError on every rank when no checkpoint is left that training can go on from."""
    record = attempt.resume
    while record is not None:
        directory = attempt.run.path(record.directory)
        act = partial(_try, engine, directory, built, attempt, group)
        (state, problem), [damaged] = group.act_and_sum(act, width=1, doing="loading weights")
        if not damaged:
            return state
        problems = [text for text in group.peers.gather(problem) if text]
        record = group.from_main(partial(_before, attempt, record, problems[0], recorder), "looking for a checkpoint")
    return None


def _try(
    engine: Engine, directory: str, built: BuiltModel, attempt: Attempt, group: Group
) -> tuple[tuple[dict[str, Any] | None, str], list[float]]:
    try:
        with shared_on_node(directory, group.world, attempt.key) as share:
            load_parts(engine, directory, built.has_adapter, share, built.layout)
        return (read_state(directory), ""), [0]
    except DamagedError as error:
        return (None, str(error)), [1]


def _before(attempt: Attempt, damaged: CommitRecord, problem: str, recorder: Recorder | None) -> CommitRecord:
    """The next older checkpoint, on rank 0; the damaged one is set aside, so that it counts no more."""
    notes = [problem]
    older = latest_resumable(attempt.run.url, notes.append, before=damaged.step)
    if older is None:
        listed = "\n  ".join(notes)
        raise UserError(
            f"no checkpoint is left that training can go on from:\n  {listed}\nBegin a new run with --fresh."
        )
    set_aside(attempt.run.url, damaged)
    if recorder:
        for note in notes:
            recorder.message(note, level="warning")
        text = f"checkpoint of step {damaged.step} is set aside: going on from that of step {older.step}"
        recorder.message(text, level="warning")
    return older
