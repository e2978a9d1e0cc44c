"""`ftlaunch selftest recipe.yaml`: a few steps of the user's own model on the user's own data, laid out in several
ways, which must all give the same losses and gradient norms. Everything happens in a folder that is deleted."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from ..distributed.indexing import index_data
from ..distributed.model_files import ModelFolder, find_model
from ..distributed.run_directory import RunDirectory
from ..recipes.errors import InfrastructureError, UserError
from ..recipes.load import LoadedRecipe
from ..recipes.redact import dump_recipe, redact
from ..recipes.schema import Recipe
from . import units
from .check_progress import Progress
from .hardware import Machine, this_machine
from .plan_model import plan_model
from .plan_strategy import plan_strategy
from .plan_world import WorldPlan
from .selftest_layouts import (
    Layout,
    choose_layouts,
    reference_of,
    same_micro_batches,
    with_references,
)
from .selftest_model import Small, dropouts, has_experts, write_small_model
from .selftest_ranks import RankPool, Task
from .selftest_recipe import laid_out, obstacles, trial_recipe
from .selftest_verdict import TOLERANCE, Circumstances, Curve, Differing, Verdict, explain, judge
from .unknown import Unknown, then

CPU_RANKS = 4
"""Ranks of the largest layout where there are no GPUs: 3 divides nearly nothing, 4 can be two nodes of two."""

INDEX = "index"


@dataclass(frozen=True)
class Options:
    """What the user asked for. `ranks`: of the largest layout; None: all GPUs, or `CPU_RANKS`."""

    steps: int
    ranks: int | None
    scale_down: bool


@dataclass(frozen=True)
class Row:
    """A layout and what became of it: a curve, or why there is none."""

    layout: Layout
    curve: Curve | None = None
    problem: str = ""
    is_bug: bool = False


def selftest(loaded: LoadedRecipe, options: Options) -> int:
    """Run the layouts, print a line for each, and say what they mean; 0 when all that could be compared agree, 1 when
    one differs. Raises UserError when the recipe cannot be run at all, InfrastructureError after a crash."""
    machine = this_machine()
    device, ranks = _device_and_ranks(loaded.recipe, options, machine)
    with tempfile.TemporaryDirectory(prefix="ftlaunch-selftest-") as temporary:
        folder = Path(temporary)
        model, small = _model(loaded.recipe, folder, scale_down=options.scale_down)
        trial = trial_recipe(
            loaded.recipe, model.url, options.steps, ranks, folder / "runs", scale_down=options.scale_down
        )
        dropout = bool(dropouts(model.config)) or (trial.adapter is not None and trial.adapter.dropout > 0)
        layouts = with_references(choose_layouts(trial, ranks), dropout=dropout)
        _announce(loaded.recipe, trial, small, model, device, ranks)
        test = _Test(replace(loaded, recipe=trial), layouts, device, machine, folder, dropout=dropout)
        return test.conclude(test.run(ranks), has_experts(model.config))


def _device_and_ranks(recipe: Recipe, options: Options, machine: Machine) -> tuple[str, int]:
    """Raises UserError for more ranks than there are GPUs."""
    gpus = 0 if recipe.cluster.gpus_per_node == 0 else machine.gpus
    ranks = options.ranks or gpus or CPU_RANKS
    if gpus and ranks > gpus:
        raise UserError(
            f"--ranks {ranks}: this machine has {gpus} GPUs, and each rank takes one. Ask for fewer, or test on the "
            "CPU with --gpus-per-node 0."
        )
    return ("cuda" if gpus else "cpu"), ranks


def _model(recipe: Recipe, folder: Path, *, scale_down: bool) -> tuple[ModelFolder, Small | None]:
    """The model that is trained: the recipe's, or a small one of its kind."""
    path, revision = recipe.model.path, recipe.model.revision
    if not scale_down:
        return find_model(path, revision), None
    source = find_model(path, revision, weights=False)
    small = write_small_model(source, folder / "model", recipe.model.dtype, recipe.train.seed)
    return ModelFolder(str(small.folder)), small


def _announce(recipe: Recipe, trial: Recipe, small: Small | None, model: ModelFolder, device: str, ranks: int) -> None:
    size = "as it is" if small is None else f"random, {small.description}"
    kind = model.config.get("model_type", "model")
    where = f"{ranks} GPU{'s' * (ranks > 1)}" if device == "cuda" else f"{ranks} processes of this machine's CPU"
    print(f"self-test of {recipe.name}: {trial.train.max_steps} steps of {kind} ({size}) on up to {where}")
    print(
        f"  {trial.train.global_batch_size} sequences of {trial.data.sequence_length} tokens a step, constant learning "
        f"rate {trial.train.learning_rate:g}; nothing is saved"
    )


@dataclass
class _Test:
    """The layouts of one recipe on this machine. `loaded` holds the trial recipe."""

    loaded: LoadedRecipe
    layouts: Sequence[Layout]
    device: str
    machine: Machine
    folder: Path
    dropout: bool

    def run(self, ranks: int) -> list[tuple[Row, Verdict | None]]:
        """Every layout, each told as soon as it is done. Raises UserError or InfrastructureError where a reference
        cannot be run."""
        rows: dict[Layout, Row] = {}
        told: list[tuple[Row, Verdict | None]] = []
        width = max(len(str(layout)) for layout in self.layouts)
        progress = _Steps(len(self.layouts), self.loaded.recipe.train.max_steps or 1)
        print(f"  {'layout':{width}}  {'last loss':>9}  {'loss off by':>11}  {'norm off by':>11}")
        with self._pool(ranks) as pool:
            for number, layout in enumerate(self.layouts):
                row = self._try(pool, layout, number, progress)
                progress.layout_done()
                rows[layout] = row
                verdict = self._judge(row, rows)
                told.append((row, verdict))
                print(f"  {layout!s:{width}}  {_line(row, verdict)}", flush=True)
        progress.done()
        return told

    @contextmanager
    def _pool(self, ranks: int) -> Iterator[RankPool]:
        pool = RankPool(ranks, self.folder)
        try:
            yield pool
        finally:
            pool.stop()

    def _try(self, pool: RankPool, layout: Layout, number: int, progress: _Steps) -> Row:
        recipe = laid_out(self.loaded.recipe, layout, f"layout-{number}")
        problem = next(obstacles(recipe), None) or self._too_large(recipe, layout)
        if problem is not None:
            return self._unless_reference(Row(layout, problem=problem))
        loaded = replace(self.loaded, recipe=recipe)
        self._hand_on_index(loaded)
        steps: list[Mapping[str, float]] = []

        def on_step(values: Mapping[str, float]) -> None:
            steps.append(values)
            progress.step(str(layout))

        rendezvous = f"file://{self.folder}/rendezvous-{number}"
        failed = pool.run(Task(loaded, layout.ranks, layout.nodes, self.device, rendezvous), on_step)
        # Runs take no place for longer than they need it.
        shutil.rmtree(self.folder / "runs" / recipe.name, ignore_errors=True)
        if failed is not None:
            message = redact(failed.message, self.loaded.secrets)
            return self._unless_reference(Row(layout, problem=message, is_bug=failed.is_bug))
        columns = [tuple(step[name] for step in steps) for name in ("loss", "grad_norm", "supervised_tokens")]
        return Row(layout, Curve(*columns))

    def _unless_reference(self, row: Row) -> Row:
        """Without the layout that others are compared with there is nothing to say."""
        if self._reference(row.layout) != row.layout:
            return row
        if row.is_bug:
            raise InfrastructureError(f"{row.layout} failed:\n{row.problem}")
        raise UserError(
            f"{row.layout}, which the others are compared with, cannot be run: {row.problem}\n"
            "--scale-down takes a small model of the same kind."
        )

    def _too_large(self, recipe: Recipe, layout: Layout) -> str | None:
        """By the plan's estimate."""
        world = WorldPlan(layout.nodes, layout.ranks // layout.nodes, self.device)
        plan = then(plan_model(recipe), lambda model: plan_strategy(recipe, model, world, self.machine))
        if isinstance(plan, Unknown):
            return None
        on_gpu = self.device == "cuda"
        needed = plan.rank_bytes if on_gpu else (plan.rank_bytes + plan.memory.offloaded) * layout.ranks
        there = self.machine.gpu_memory_bytes if on_gpu else int(psutil.virtual_memory().available)
        if not there or needed <= there:
            return None
        return f"it takes about {units.size(needed)} of memory, and {units.size(there)} are there"

    def _hand_on_index(self, loaded: LoadedRecipe) -> None:
        """The data is indexed once, for all."""
        run = RunDirectory(f"{loaded.recipe.checkpoint.path}/{loaded.recipe.name}")
        first = self.folder / INDEX
        if first.exists():
            shutil.copytree(first, run.path(INDEX))
        index_data(loaded.recipe, run, begin=lambda: run.store_recipe(dump_recipe(loaded.recipe, loaded.secrets)))
        if not first.exists():
            shutil.copytree(run.path(INDEX), first)

    def _reference(self, layout: Layout) -> Layout:
        return reference_of(layout, dropout=self.dropout)

    def _judge(self, row: Row, rows: Mapping[Layout, Row]) -> Verdict | None:
        """None for a reference, and for a row without a curve."""
        reference = rows[self._reference(row.layout)]
        if row is reference or row.curve is None or reference.curve is None:
            return None
        from ..distributed.optimizers.table import OPTIMIZERS

        recipe = self.loaded.recipe
        streams, batch = recipe.data.streams or 1, recipe.train.global_batch_size
        alike = same_micro_batches(row.layout, reference.layout, streams, batch)
        return judge(
            row.curve,
            reference.curve,
            layout_bound=OPTIMIZERS[recipe.train.optimizer].layout_bound is not None,
            other_dropout=self.dropout and not alike,
        )

    def conclude(self, told: Sequence[tuple[Row, Verdict | None]], experts: bool) -> int:
        """Say what came out; the exit code."""
        for line in self._footnotes(told):
            print(line)
        differing = list(self._differing(told))
        agreeing = [row for row, verdict in told if verdict is not None and verdict.outcome != "differs"]
        if differing:
            self._explain(differing, agreeing, experts)
        if crashed := [row for row, _ in told if row.is_bug]:
            raise InfrastructureError("\n".join(f"{row.layout} failed:\n{row.problem}" for row in crashed))
        own = [row for row, _ in told if row.layout.strategy == self.loaded.recipe.strategy]
        if all(row.curve is None for row in own):
            raise UserError(f"the recipe's own strategy could not be run: {own[0].problem}")
        if differing:
            return 1
        if not agreeing:
            raise UserError("no layout could be compared with another; what keeps them back is said above")
        print(f"all {len(agreeing)} layouts agree with their references")
        return 0

    def _explain(self, differing: Sequence[Differing], agreeing: Sequence[Row], experts: bool) -> None:
        about = Circumstances(
            dropout=self.dropout,
            experts=experts,
            only_bfloat16=all(one.name.endswith("bfloat16") for one in differing),
            agreeing_sizes=frozenset(row.layout.micro_batch_size for row in agreeing),
        )
        print(f"{len(differing)} of {len(differing) + len(agreeing)} layouts differ:")
        for one in differing:
            print(f"  {one.name}: {one.verdict.where}")
        print("what it may mean:")
        for line in explain(differing, about):
            print(f"  - {line}")

    def _footnotes(self, told: Sequence[tuple[Row, Verdict | None]]) -> Iterator[str]:
        outcomes = {verdict.outcome for _, verdict in told if verdict}
        yield (
            f"tolerance: {TOLERANCE.first:g} in the first step, {TOLERANCE.later:g} behind it, relative. float32 "
            "rounds at 6e-8, sums gather some 1e-7 to 1e-6 of it, and updates feed it back"
        )
        if "layout-bound" in outcomes:
            from ..distributed.optimizers.table import OPTIMIZERS

            optimizer = self.loaded.recipe.train.optimizer
            yield (
                f"layout-bound: {optimizer}: {OPTIMIZERS[optimizer].layout_bound}. Its first step is compared, before "
                "it has done anything; what is behind it is shown and not judged"
            )
        if "other dropout" in outcomes:
            yield (
                "other dropout: values are dropped once per micro-batch, and these micro-batches hold other sequences "
                "than the reference's; only the data is compared"
            )

    def _differing(self, told: Sequence[tuple[Row, Verdict | None]]) -> Iterator[Differing]:
        curves = {row.layout: row.curve for row, _ in told}
        for row, verdict in told:
            reference = curves[self._reference(row.layout)]
            if verdict is not None and verdict.outcome == "differs" and row.curve is not None and reference is not None:
                layout = row.layout
                yield Differing(str(layout), layout.ranks, layout.micro_batch_size, row.curve, reference, verdict)


def _line(row: Row, verdict: Verdict | None) -> str:
    """What the table says behind a layout's name."""
    if row.curve is None:
        return "failed, see below" if row.is_bug else f"not run: {row.problem.splitlines()[0]}"
    loss = f"{row.curve.losses[-1]:9.5f}" if row.curve.losses else "no steps"
    if verdict is None:
        return f"{loss}  what others are compared with"
    outcome = "DIFFERS" if verdict.outcome == "differs" else verdict.outcome
    return f"{loss}  {verdict.loss:11.1e}  {verdict.grad_norm:11.1e}  {outcome}"


class _Steps:
    """How far it is, on standard error. A layout counts for its steps and for its start, which takes as long as one."""

    def __init__(self, layouts: int, steps: int) -> None:
        self._total, self._each = layouts * (steps + 1), steps + 1
        self._layouts, self._now = 0, 0
        self._progress = Progress(
            sys.stderr, drawn_over=sys.stderr.isatty(), amount=lambda number: f"{number} of {self._total} steps"
        )

    def step(self, what: str) -> None:
        self._now = min(self._now + 1, self._each)
        number = self._layouts * self._each + self._now
        self._progress.update(what, number, number / self._total)

    def layout_done(self) -> None:
        self._layouts, self._now = self._layouts + 1, 0
        self._progress.done()

    def done(self) -> None:
        self._progress.done()
