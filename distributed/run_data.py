"""A run's data, put together: its index in the run directory, its training stream, its eval sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..recipes.errors import UserError
from ..recipes.methods.base import Method
from ..recipes.schema import EvalSplit, Recipe, Source
from .attempt import Attempt
from .data.epoch_again import EpochAgain, begin_epoch_again
from .data.evaluation import EvalBatches
from .data.feed import read_ahead
from .data.index import Index
from .data.lane_plan import by_source, integer_weights_of, order_key, plan_lanes
from .data.parts import MicroBatch
from .data.stream import Stream, open_stream, usual_readers
from .evaluate import Reader
from .group import Group, cores
from .indexing import digest_of, eval_index, index_data, load_index, train_index
from .model_files import ModelFolder
from .prepare import check_prepared
from .row_encoder import RowEncoder, open_encoder, spec_of
from .world import World


@dataclass(frozen=True)
class RunData:
    """What one rank reads. `digest` tells which files the index is of, and in which order they are read."""

    recipe: Recipe
    method: Method
    attempt: Attempt
    group: Group
    train: Index
    eval: Index | None
    digest: str
    encode: RowEncoder
    stream: Stream
    """Open from the start, so that reader processes come up while the model is built."""
    changes: Sequence[str]
    """What became of the files since the run began, where it goes on with them and nobody has said so yet."""

    def training_stream(self, states: Mapping[str, Any] | None) -> Stream:
        """This rank's stream, reading from its beginning on or from where `states` (of all ranks) were taken."""
        if states is not None:
            self.stream.restore(states)
        self.stream.begin()
        return self.stream

    def begin_epoch_again(self, states: Mapping[str, Any]) -> EpochAgain:
        """Where the streams go on when the files are no longer those that `states` were taken on."""
        plans = plan_lanes(self.train, self.recipe.data, self.recipe.train, self.attempt.streams)
        return begin_epoch_again(states, plans)

    def notes(self) -> Iterator[str]:
        """What was decided for the user: files as they are now, row formats that were found from columns."""
        yield from self.changes
        data = self.recipe.data
        held_out = () if isinstance(data.eval, EvalSplit) else data.eval
        infos = self.train.sources + (self.eval.sources if self.eval else ())
        for info, source in zip(infos, (*data.train, *held_out), strict=True):
            if source.format is None:
                yield f"source {info.name}: its rows are read as {info.format}, which its columns fit"

    def close(self) -> None:
        """End the readers."""
        self.stream.close()

    def new_weights(self, states: Mapping[str, Any]) -> str | None:
        """What the sources are drawn by from now on, where it is not what they were drawn by; in words."""
        names = [info.name for info in self.train.sources]
        now = dict(zip(names, integer_weights_of(self.recipe.data), strict=True))
        before = next(iter(states.values()))["weights"]
        if not by_source(self.recipe.data) or before == now:
            return None
        return f"{_in_words(now)} (before: {_in_words(before)})"

    def eval_sets(self) -> dict[str, Reader]:
        """Readers of the held-out sets by name."""
        data = self.recipe.data
        if isinstance(data.eval, EvalSplit):
            return {
                info.name: partial(
                    self._eval_batches, self.train.select(number), data.train[number], data.eval.fraction
                )
                for number, info in enumerate(self.train.sources)
            }
        if self.eval is None:
            return {}
        return {
            info.name: partial(self._eval_batches, self.eval.select(number), data.eval[number], None)
            for number, info in enumerate(self.eval.sources)
        }

    def _eval_batches(self, index: Index, source: Source, fraction: float | None) -> Iterator[MicroBatch]:
        batches = EvalBatches(
            index,
            data=self.recipe.data,
            world_rank=self.group.world.rank,
            world_size=self.group.world.size,
            micro_batch_size=self.recipe.train.micro_batch_size,
            encode=self.encode,
            collate=self.method.collate,
            source=source,
            held_out_fraction=fraction,
        )
        return read_ahead(iter(batches))


def _in_words(weights: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {weight / sum(weights.values()):.4g}" for name, weight in weights.items())


def open_data(recipe: Recipe, folder: ModelFolder, method: Method, attempt: Attempt, group: Group) -> RunData:
    """Find, index and verify the data on rank 0, and open it on every rank. Raises UserError."""
    _require_to_divide(recipe.train.global_batch_size, attempt.streams)
    spec = spec_of(recipe, folder, now=attempt.started_at)
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as beside:
        encoder = beside.submit(open_encoder, spec)  # while footers come, and while other ranks wait for the index
        changes = group.from_main(partial(index_data, recipe, attempt.run), "indexing the data")
    train, evals = train_index(recipe.data), eval_index(recipe.data)
    train_blocks = load_index(attempt.run, train)
    encode = encoder.result()
    group.from_main(
        partial(check_prepared, train_blocks, train.key, encode, recipe.data.sequence_length), "looking at the data"
    )
    stream = group.alike(
        partial(_open_stream, recipe, train_blocks, encode, method, attempt, group.world), "opening the training data"
    )
    return RunData(
        recipe=recipe,
        method=method,
        attempt=attempt,
        group=group,
        train=train_blocks,
        eval=load_index(attempt.run, evals) if evals.sources else None,
        digest=f"{order_key(recipe.data, recipe.train)}, {digest_of(train, train_blocks)}",
        encode=encode,
        stream=stream,
        changes=changes,
    )


def _require_to_divide(global_batch_size: int, streams: int) -> None:
    """The run's first start cut the data into streams, for as long as it lasts. Raises UserError for another batch that
    they do not divide."""
    if global_batch_size % streams:
        near = max(streams, round(global_batch_size / streams) * streams)
        raise UserError(
            f"train.global_batch_size {global_batch_size}: the run's data was cut into {streams} streams when it "
            f"began, and every step takes as many sequences of each. Take a multiple of {streams}, as {near}, or begin "
            "a new run with --fresh."
        )


def _open_stream(
    recipe: Recipe, index: Index, encode: RowEncoder, method: Method, attempt: Attempt, world: World
) -> Stream:
    asked = recipe.data.reader_processes
    usual = usual_readers(cores() // world.local_size, on_gpu=world.device != "cpu")
    return open_stream(
        index=index,
        recipe=recipe,
        world_rank=world.rank,
        world_size=world.size,
        streams=attempt.streams,
        encode=encode,
        collate=method.collate,
        # Compiled blocks are made anew for every shape.
        pad_to_full=recipe.train.compile,
        reader_processes=usual if asked is None else asked,
        node_key=f"{attempt.run.url} attempt {attempt.number}",
    )
