"""The steps alone: a rank of a run that is thrown away, for `ftlaunch selftest`. Nothing is evaluated or saved."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial

from . import group as groups
from .attempt import begin_attempt
from .entry import Job, build_run, set_variables
from .loop import take_steps
from .metrics import Recorder


def try_steps(job: Job) -> None:
    """Take the recipe's steps as one rank; the monitor of rank 0 sees them. The recipe says neither when to evaluate
    nor when to save. Raises what `entry.run_rank` raises."""
    set_variables(job.loaded.recipe)
    with groups.connected(job.world, job.rendezvous) as group, ExitStack() as resources:
        begin = partial(begin_attempt, job.loaded, job.world.size, job.command)
        attempt = group.from_main(begin, "opening the run directory")
        recorder = Recorder.open(job.loaded, attempt, job.monitor) if job.world.is_main else None
        if recorder:
            resources.enter_context(closing(recorder))
        take_steps(build_run(job, group, attempt, recorder, resources))
