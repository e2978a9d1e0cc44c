"""One rank's program: reads the tables, builds everything, and calls `loop.train`.

It runs the same under Ray (`launcher/worker.py` calls `run_rank`) and under torchrun:

    torchrun --nproc-per-node 2 -m ftlaunch.distributed.entry recipe.yaml [key.sub=value …]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ..recipes.errors import FtlaunchError, Interrupted, RankError, UserError
from ..recipes.load import LoadedRecipe, as_stored, load_recipe
from ..recipes.methods.base import Method
from ..recipes.methods.table import build_method
from ..recipes.problems import Origin, located
from ..recipes.redact import redact
from ..recipes.schema import Recipe
from . import group as groups
from . import storage
from .again import Flags, decide, gather
from .attempt import Attempt, begin_attempt, take_over_recipe
from .checkpoint.content import Content
from .checkpoint.save import CheckpointWriter
from .checkpoint.shared import share_local_folder
from .checkpoint.staging import Staging
from .choosing import Chosen, choose_strategy
from .evaluate import Evaluator
from .group import Group
from .indexing import accept_changed_data, same_sources
from .loop import Run, train
from .memory import within_memory
from .metrics import Recorder
from .model import BuiltModel, build_model
from .model_files import ModelFolder, find_model, is_hub_id
from .monitor import Monitor, PlainMonitor
from .optimizers.table import layout_note
from .probes import check_packing, check_positions, choose_attention, choose_head
from .published import base_of, published_files, read_base
from .run_data import RunData, open_data
from .run_directory import Outcome, RunDirectory
from .save_mode import agree_on_mode
from .saver import Saver, parts_of
from .schedule import Extent
from .start_weights import load_weights
from .strategies.base import Engine
from .strategies.table import prepare
from .world import World


@dataclass(frozen=True)
class Job:
    """What a rank is told: the recipe, where it stands, how to find the others, whom to tell."""

    loaded: LoadedRecipe
    world: World
    rendezvous: str
    monitor: Monitor
    command: tuple[str, ...] = ()
    flags: Flags | None = None
    """What the user allowed if the run is there already; None: the launcher has decided."""
    began: float | None = None
    """When this process was given it, in seconds since 1970, where it had stood by."""
    begun: Callable[[Attempt], None] = lambda _attempt: None
    """Told on every rank as soon as the attempt has its number."""


@dataclass(frozen=True)
class PolicyModel:
    """The trained model as losses see it (`recipes.methods.base.Models`)."""

    module: torch.nn.Module

    def policy(self, batch: Any) -> torch.Tensor:
        """Per-token losses [B, S]."""
        losses: torch.Tensor = self.module(batch)
        return losses


def run_rank(job: Job) -> str:
    """Train as one rank of a run: "finished" or "stopped_early". Raises Interrupted after a requested stop, and
    UserError or InfrastructureError, on every rank alike."""
    set_variables(job.loaded.recipe)
    job.monitor.emit({"kind": "phase", "phase": "connecting"})
    with groups.connected(job.world, job.rendezvous) as group:
        if job.flags and not group.from_main(partial(_trains, job, job.flags), "looking at the run"):
            return "finished"
        attempt = group.from_main(
            partial(begin_attempt, job.loaded, job.world.size, job.command, job.began), "opening the run directory"
        )
        group.alike(partial(attempt.run.check_shared, attempt.number), "looking at the run directory")
        job.begun(attempt)
        return _attempt(job, group, attempt)


def _trains(job: Job, flags: Flags) -> bool:
    """Whether there is something to train, on rank 0. Raises UserError for a refusal."""
    recipe = job.loaded.recipe
    run = RunDirectory(storage.join(recipe.checkpoint.path, recipe.name))
    decision = decide(gather(run, lambda line: _say(job.monitor, line)), as_stored(job.loaded), flags)
    if decision.action in ("stop", "alive"):
        raise UserError(decision.message)
    _say(job.monitor, decision.message)
    if flags.accept_changed_data and decision.trains:
        accept_changed_data(run)
    return decision.trains


def _say(monitor: Monitor, text: str) -> None:
    monitor.emit({"kind": "message", "text": text, "level": "info"})


def _attempt(job: Job, group: Group, attempt: Attempt) -> str:
    """Run one attempt, and write down how it ended."""
    ending: tuple[Outcome, str] = "failed", ""
    recorder: Recorder | None = None
    try:
        with group.peers.together("opening the logs"):
            if job.world.is_main:
                recorder = Recorder.open(job.loaded, attempt, job.monitor)
        with ExitStack() as resources:
            run = build_run(job, group, attempt, recorder, resources)
            group.from_main(partial(take_over_recipe, attempt), "storing the recipe")
            outcome = train(run)
        if outcome == "interrupted":
            ending = "interrupted", ""
            raise Interrupted(f"stopped after step {run.extent.steps}; the same command continues from there")
        ending = "finished", outcome
        if recorder:
            attempt.run.write_result({"outcome": outcome, **asdict(run.extent), "losses": run.evaluator.last})
        return outcome
    except Exception as error:
        ending = ending[0], redact(str(error), job.loaded.secrets)
        raise
    finally:
        # What made it fail is what counts: a full disk, say, refuses this too.
        with suppress(FtlaunchError) if ending[0] == "failed" else nullcontext(), ExitStack() as closes:
            if job.world.is_main:
                closes.callback(attempt.run.finish_attempt, attempt.number, *ending)
            if recorder:
                closes.callback(recorder.close)


def build_run(job: Job, group: Group, attempt: Attempt, recorder: Recorder | None, resources: ExitStack) -> Run:
    """Everything a rank trains with, in the order in which mistakes are cheapest to find. `resources` closes it."""
    recipe, world = _pinned(job.loaded.recipe, attempt), job.world
    say: Callable[[str], None] = recorder.phase if recorder else lambda _phase: None
    say("reading the data's index")
    folder = _find_folder(recipe, attempt, group)
    method = build_method(recipe.method)
    data = resources.enter_context(closing(open_data(recipe, folder, method, attempt, group)))
    if recorder:
        for note in data.notes():
            recorder.message(note)
    say("building the model")
    built = build_model(recipe, folder)
    chosen = choose_strategy(recipe, built, folder.config, attempt, group, recorder)
    recipe = chosen.recipe
    with within_memory(world, "laying out the model", chosen.advise):
        engine = prepare(built, recipe, world)
    state = load_weights(recipe, built, engine, folder, attempt, group, recorder)
    extent, states = _where(state, data, recorder)
    stream = group.alike(lambda: data.training_stream(states), "continuing the training data")
    with within_memory(world, "trying the model out", chosen.advise):
        _probe(recipe, built, engine, group, recorder)
    evaluator = _evaluator(chosen, group, method, engine, data, recorder, state)
    published = group.alike(
        lambda: published_files(recipe, built, folder) if world.is_main else {}, "reading the model"
    )
    content = _content(engine, built)
    writer, staging = _writer(job, group, attempt, content, recorder)
    saver = Saver(
        recipe=recipe,
        run=attempt.run,
        group=group,
        engine=engine,
        stream=stream,
        evaluator=evaluator,
        writer=writer,
        staging=staging,
        recorder=recorder,
        extra_files=published,
        parts=content.parts,
        frozen=content.frozen,
        data_digest=data.digest,
        last_step=extent.steps if state else None,
    )
    resources.push(saver.close)
    say("training")
    return Run(
        recipe=recipe,
        group=group,
        method=method,
        models=evaluator.models,
        engine=engine,
        stream=stream,
        evaluator=evaluator,
        saver=saver,
        monitor=job.monitor,
        recorder=recorder,
        extent=extent,
        advise=chosen.advise,
    )


def _content(engine: Engine, built: BuiltModel) -> Content:
    """What of a model a checkpoint holds."""
    parts = parts_of(engine, has_adapter=built.has_adapter, layout=built.layout)
    return Content(parts, frozen=frozenset(built.layout.names(built.frozen())))


def _writer(
    job: Job, group: Group, attempt: Attempt, content: Content, recorder: Recorder | None
) -> tuple[CheckpointWriter, Staging | None]:
    """What writes checkpoints, and where copies go if that happens beside the training."""
    url, peers = attempt.run.url, group.for_saves()
    in_place = share_local_folder(url, peers)
    fence = partial(attempt.run.check_newest, attempt.number)
    announce = partial(_announce, recorder)
    writer = CheckpointWriter(url, attempt.number, announce, peers, in_place=in_place, fence=fence)
    copy_bytes = sum(plan.copied_bytes() for plan in writer.plan(content).values())
    mode, note = agree_on_mode(job.loaded.recipe.checkpoint.mode, copy_bytes, group.peers)
    if recorder and note:
        recorder.message(note)
    return writer, Staging(pinned=job.world.device != "cpu") if mode == "async" else None


def _evaluator(
    chosen: Chosen,
    group: Group,
    method: Method,
    engine: Engine,
    data: RunData,
    recorder: Recorder | None,
    state: Mapping[str, Any] | None,
) -> Evaluator:
    """As it was in the state that the run continues from."""
    evaluator = Evaluator(
        group=group,
        method=method,
        models=PolicyModel(engine.module),
        engine=engine,
        sets=data.eval_sets(),
        early_stopping=chosen.recipe.evaluate.early_stopping,
        recorder=recorder,
        advise=chosen.advise,
    )
    if state:
        evaluator.restore(state["evaluator"])
    return evaluator


def _pinned(recipe: Recipe, attempt: Attempt) -> Recipe:
    """The recipe with the hub's commit that the run began on."""
    model = recipe.model.model_copy(update={"revision": attempt.model_revision or recipe.model.revision})
    return recipe.model_copy(update={"model": model})


def _find_folder(recipe: Recipe, attempt: Attempt, group: Group) -> ModelFolder:
    """The model's folder, with a place of this rank's own for copies: hosts share neither those nor a hub's cache. What
    the latest checkpoint of a run is, rank 0 decides."""
    path, revision = recipe.model.path, recipe.model.revision
    url = group.from_main(lambda: _base_url(recipe, attempt), "looking for the model")
    pickles = recipe.model.allow_pickle
    return group.alike(
        lambda: find_model(path, revision, pickles=pickles) if is_hub_id(path) else ModelFolder(url),
        "finding the model",
    )


def _base_url(recipe: Recipe, attempt: Attempt) -> str:
    """Where the base model is. An adapter of a run's checkpoint stays with that one when the run has gone on since."""
    folder = find_model(recipe.model.path, recipe.model.revision, pickles=recipe.model.allow_pickle)
    if recipe.adapter is None or attempt.resume is None or folder.url == recipe.model.path:
        return folder.url
    stored = read_base(attempt.run.path(attempt.resume.directory))
    earlier = ModelFolder(storage.join(recipe.model.path, stored.rpartition("/")[2]))
    return stored if base_of(recipe, earlier) == stored else folder.url


def _where(
    state: Mapping[str, Any] | None, data: RunData, recorder: Recorder | None
) -> tuple[Extent, Mapping[str, Any] | None]:
    """How far the run is, and the states of its streams. Other sources that the user accepted are read from their
    beginning; of the same sources with other files the epoch begins again."""
    if state is None:
        return Extent(), None
    extent = Extent(**state["extent"])
    if state["data"] == data.digest:
        weights = data.new_weights(state["stream"])
        if recorder and weights:
            recorder.message(f"behind step {extent.steps} samples are drawn by new weights: {weights}")
        return extent, state["stream"]
    if same_sources(state["data"], data.digest):
        again = data.begin_epoch_again(state["stream"])
        served, states = again.served_bytes, again.states
        note = f"files of data.train have changed: epoch {again.epoch + 1} begins again on them"
    else:
        served, states = 0, None
        order = "train.seed, data.shuffle, weights or none"
        note = f"data.train, or its order ({order}), has changed: it is read from its beginning"
    if recorder:
        recorder.message(note, level="warning")
    return replace(extent, served_bytes=served), states


def _probe(recipe: Recipe, built: BuiltModel, engine: Engine, group: Group, recorder: Recorder | None) -> None:
    """The checks that need the real model, before anything is trained."""
    text_config, packing = built.config.get_text_config(), recipe.data.packing
    most = getattr(text_config, "max_position_embeddings", None)
    beyond = check_positions(built.loss_model.causal_lm, most, recipe.data.sequence_length)
    attention = None
    if packing and recipe.model.attention == "auto" and recipe.model.dtype == "bfloat16":
        attention = choose_attention(engine.module, built.loss_model, group, recipe.data.sequence_length)
    head = choose_head(engine.module, built.loss_model, group, text_config.vocab_size, recipe.model.dtype)
    if recorder:
        for note in filter(None, (beyond, attention, head, layout_note(recipe.train))):
            recorder.message(note, level="warning")
    if packing:
        check_packing(
            engine.module,
            group,
            text_config.vocab_size,
            text_config.model_type,
            micro_batch_size=recipe.train.micro_batch_size,
        )


def _announce(recorder: Recorder | None, kind: str, **fields: Any) -> None:
    if recorder:
        recorder.events.record(kind, **fields)


def set_variables(recipe: Recipe) -> None:
    """What libraries take from variables, or keep for the process."""
    # Readers tokenise in threads or processes of their own; threads of each of them beneath would fight for the cores
    # (half as long again on two of them). A user's own setting stays.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if recipe.train.deterministic:
        # cuBLAS reads this when it is first used; without it deterministic matmuls are refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _split_flags(arguments: Sequence[str]) -> tuple[Flags, list[str]]:
    """Flags, and what is left. Raises UserError for one that only `ftlaunch` itself takes."""
    given = {argument for argument in arguments if argument.startswith("--")}
    if unknown := sorted(given - {"--accept-changes", "--accept-changed-data"}):
        hint = " Give the new run another name: name=NAME." if "--fresh" in unknown else ""
        raise UserError(
            f"{', '.join(unknown)}: under torchrun only --accept-changes and --accept-changed-data can be given.{hint}"
        )
    values = [argument for argument in arguments if argument not in given]
    flags = Flags(accept_changes="--accept-changes" in given, accept_changed_data="--accept-changed-data" in given)
    return flags, values


def main(argv: Sequence[str] | None = None) -> int:
    """One rank under torchrun; the exit codes of the command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_main = os.environ.get("RANK", "0") == "0"
    monitor = PlainMonitor(speaks=is_main)
    monitor.install_signal_handlers()
    secrets: tuple[str, ...] = ()
    origins: Mapping[str, Origin] = {}
    try:
        world = World.from_torchrun(os.environ, num_gpus=torch.cuda.device_count())
        flags, values = _split_flags(arguments)
        if not values:
            raise UserError("which recipe? torchrun … -m ftlaunch.distributed.entry recipe.yaml [key.sub=value …]")
        loaded = load_recipe(values[0], values[1:], environ=os.environ)
        secrets, origins = loaded.secrets, loaded.origins
        run_rank(Job(loaded, world, "env://", monitor, command=("torchrun", *arguments), flags=flags))
    except FtlaunchError as error:
        if is_main or isinstance(error, RankError):
            sys.stderr.write(f"{redact(located(error, origins), secrets)}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    groups.exit_process(main())
