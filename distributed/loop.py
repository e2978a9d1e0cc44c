"""The training loop. It reads like a table of contents: no branch on method, strategy or cluster is taken here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..recipes.errors import UserError
from ..recipes.methods.base import Method, Models
from ..recipes.schema import EvalSplit, Recipe
from .batch import on_device, seed_dropout
from .data.parts import MicroBatch
from .data.stream import StepBatches, Stream
from .evaluate import Evaluator
from .group import Group
from .memory import memory_bytes, within_memory
from .metrics import Recorder, Stopwatch
from .monitor import Monitor
from .saver import Saver
from .schedule import Extent, is_bounded_by_data, learning_rate, progress
from .strategies.base import Engine

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Run:
    """Everything one rank trains with, built by `entry`."""

    recipe: Recipe
    group: Group
    method: Method
    models: Models
    engine: Engine
    stream: Stream
    evaluator: Evaluator
    saver: Saver
    monitor: Monitor
    recorder: Recorder | None
    """Only on rank 0."""
    extent: Extent
    advise: Callable[[], str]
    """What to say when memory does not suffice."""


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks, known before any forward pass of the step."""

    weight: float
    num_bins: int
    num_tokens: int
    served_bytes: int
    read_bytes: int
    needed_bytes: int
    stop: bool
    save: bool
    """A save is due by the clock of rank 0."""
    data_wait_s: float
    """Until every rank had its data, as this rank saw it."""
    reader_idle_s: float
    """How long readers stood still because the loop had enough, on average of the ranks."""


def train(run: Run) -> str:
    """Train to the end of the run; "finished", "stopped_early" or "interrupted".

    Raises UserError when the loss is no longer a number; the weights stay those of the last good step.
    """
    if run.extent.steps == 0 and run.recipe.evaluate.at_start:
        run.evaluator.measure(run.extent.steps)
        run.evaluator.has_new_best()  # what has not been trained is no checkpoint
    outcome = take_steps(run)
    if outcome != "interrupted" and run.recipe.evaluate.at_end:
        run.evaluator.measure(run.extent.steps)
    run.saver.save(run.extent, last=True)
    return outcome


def take_steps(run: Run) -> str:
    """The steps of `train`, with the evaluations and saves that fall due between them; what it says."""
    watch = Stopwatch()
    while not _is_over(run):
        if _stops_early(run):
            return "stopped_early"
        watch.lap()  # saving and evaluating are no part of a step
        batches, totals = _agree_on_step(run)
        run.saver.rejections.note(batches.rejections)
        if totals.num_bins == 0:
            _refuse_no_data(run)
            return "finished"
        after = run.extent.after(tokens=totals.num_tokens, served_bytes=totals.served_bytes)
        rate = learning_rate(run.recipe.train, run.extent, after, run.stream.total_bytes)
        with within_memory(run.group.world, f"step {after.steps}", run.advise):
            loss, norm = _optimizer_step(run, batches, totals, rate)
        run.extent = after
        _record(run, totals, {"loss": loss, "learning_rate": rate, "grad_norm": norm, "step_s": watch.lap()})
        if _is_due(run.recipe.evaluate.every_steps, after.steps):
            run.evaluator.measure(after.steps)
        if run.evaluator.has_new_best() or totals.save or _is_due(run.recipe.checkpoint.every_steps, after.steps):
            run.saver.save(after)
        if totals.stop:
            return "interrupted"
    return "finished"


def _refuse_no_data(run: Run) -> None:
    """A run that ends before its first step has trained nothing, and must not look as if it had."""
    if run.extent.steps:
        return
    held_out = isinstance(run.recipe.data.eval, EvalSplit)
    none = "all rows are held out: lower data.eval.fraction" if held_out else "the files hold no rows"
    rows = "\n  ".join(dict.fromkeys(run.saver.rejections.take(run.group.peers))) or none  # they came again and again
    raise UserError(
        f"data.train: no row gives anything to learn:\n  {rows}\n`ftlaunch check` shows what is learned from a row."
    )


def _is_over(run: Run) -> bool:
    # A run bounded by its data ends with its last bin: progress reaches 1 a little before that.
    return not is_bounded_by_data(run.recipe.train) and progress(run.recipe.train, run.extent, 0) >= 1.0


def _stops_early(run: Run) -> bool:
    """Whether the evaluation of this very step used patience up. Asked again after a resume: the run may have been
    killed between its last save and its end. (The evaluation at the end of a shorter run is not one of these.)"""
    step = run.extent.steps
    measured = run.evaluator.last_step == step and _is_due(run.recipe.evaluate.every_steps, step)
    return measured and run.evaluator.should_stop_early()


def _is_due(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0


def _agree_on_step(run: Run) -> tuple[StepBatches, StepTotals]:
    """This rank's micro-batches, and what the whole step adds up to. A reader's error stops every rank."""

    def read() -> tuple[StepBatches, list[float]]:
        step = run.stream.next_step()
        weight = sum(run.method.weight(micro.batch) for micro in step.micro_batches)
        counted = step.num_bins, step.num_tokens, step.served_bytes, step.read_bytes, step.needed_bytes
        is_late = run.group.world.is_main and run.saver.is_late()
        flags = run.monitor.stop_requested(), is_late, run.saver.has_failed
        return step, [weight, *counted, *flags, step.reader_idle_s / run.group.world.size]

    watch = Stopwatch()
    batches, found = run.group.act_and_sum(read, width=10, doing="reading training data")
    weight, *sums, stop, late, lost, reader_idle_s = found
    if lost:
        run.saver.settle()
    num_bins, num_tokens, served_bytes, read_bytes, needed_bytes = map(int, sums)
    totals = StepTotals(
        weight,
        num_bins,
        num_tokens,
        served_bytes,
        read_bytes,
        needed_bytes,
        stop=bool(stop),
        save=bool(late),
        data_wait_s=watch.lap(),
        reader_idle_s=reader_idle_s,
    )
    if totals.num_bins and not totals.weight:
        raise UserError(f"step {run.extent.steps + 1}: no token of the whole global batch is supervised.")
    return batches, totals


def _optimizer_step(run: Run, batches: StepBatches, totals: StepTotals, rate: float) -> tuple[float, float]:
    """One update from one sum divided by one weight; (loss, gradient norm before clipping)."""
    run.engine.set_learning_rate(rate)
    if not run.engine.module.training:
        run.engine.module.train()  # walks all modules, which short steps would feel
    losses = [
        _micro_batch(run, micro, totals.weight, last=index == len(batches.micro_batches) - 1)
        for index, micro in enumerate(batches.micro_batches)
    ]
    norm = run.engine.step()
    loss = run.group.sum([float(torch.stack(losses).double().sum())])[0] / totals.weight
    if not math.isfinite(norm) or not math.isfinite(loss):
        _stop_at_nan(run, batches, losses, loss, norm, rate)
    return loss, norm


def _micro_batch(run: Run, micro: MicroBatch, weight: float, *, last: bool) -> Tensor:
    device = run.group.world.device
    seed_dropout(run.recipe.train.seed, run.extent.steps, micro.first_bin, device)
    terms = run.method.loss(run.models, on_device(micro.batch, device))
    run.engine.backward(terms.loss_sum, weight, last_micro_batch=last)
    return terms.loss_sum.detach()


def _stop_at_nan(
    run: Run, batches: StepBatches, losses: Sequence[Tensor], loss: float, norm: float, rate: float
) -> None:
    """Name the step and its rows; the last checkpoint stays as it is."""
    broken = [
        micro.batch.rows
        for micro, value in zip(batches.micro_batches, losses, strict=True)
        if not math.isfinite(float(value))
    ] or [micro.batch.rows for micro in batches.micro_batches]
    mine = [str(row) for rows in broken for sequence in rows for row in sequence]
    rows = [row for part in run.group.peers.gather(mine[:20]) for row in part][:20]
    raise UserError(
        f"step {run.extent.steps + 1}: the loss is {loss} and the gradient norm {norm} at learning rate {rate:.3g}. "
        "The weights were not changed, and the last checkpoint is kept. Rows of the batch:\n  "
        + "\n  ".join(rows)
        + "\nLook at these rows; lower train.learning_rate; set train.max_grad_norm."
    )


def _record(run: Run, totals: StepTotals, values: dict[str, float]) -> None:
    if run.recorder is None:
        return
    run.recorder.step(
        run.extent.steps,
        {
            **values,
            "progress": progress(run.recipe.train, run.extent, run.stream.total_bytes),
            "tokens": run.extent.tokens,
            "supervised_tokens": totals.weight,
            "tokens_per_s": totals.num_tokens / values["step_s"],
            "data_wait_s": totals.data_wait_s,
            "reader_idle_s": totals.reader_idle_s,
            "data_read_bytes": totals.read_bytes,
            "data_needed_bytes": totals.needed_bytes,
            "memory_bytes": memory_bytes(run.group.world),
        },
    )
