"""A run's data, put together: its index in the run directory, its training stream, its eval sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..recipes.errors import UserError
from ..recipes.methods.base import Method, Rejected, Row, Sample
from ..recipes.schema import EvalSplit, Recipe, RowFormat
from .attempt import Attempt
from .data.evaluation import EvalBatches
from .data.epoch_again import EpochAgain, begin_epoch_again
from .data.index import Index
from .data.lane_plan import plan_lanes
from .data.parts import MicroBatch
from .data.stream import Stream, open_stream
from .data.template import load_tokenizer
from .evaluate import Reader
from .group import Group
from .indexing import digest_of, eval_index, index_data, load_index, train_index
from .model_files import ModelFolder
from .published import template_text


@dataclass(frozen=True)
class RunData:
    """What one rank reads. `digest` tells which files the index is of."""

    recipe: Recipe
    method: Method
    encoder: Any
    attempt: Attempt
    group: Group
    train: Index
    eval: Index | None
    digest: str
    vocabulary: int | None
    """Tokens that the model knows; None: its configuration does not say."""

    def encode(self, row: Row, row_format: RowFormat) -> Sample | Rejected:
        """A row as the method learns from it. Raises UserError for a token that the model has no embedding of: some
        tokenizers hold a few more, so only those in use matter."""
        encoded = self.method.encode(row, row_format, self.encoder)
        if isinstance(encoded, Sample) and self.vocabulary is not None:
            largest = int(encoded.input_ids.max(initial=0))
            if largest >= self.vocabulary:
                raise UserError(
                    f"model.tokenizer: token {largest} ({self.encoder.decode([largest])!r}) is in the data, and the "
                    f"model knows {self.vocabulary} tokens (vocab_size in config.json). Take its own tokenizer."
                )
        return encoded

    def training_stream(self, states: Mapping[str, Any] | None) -> Stream:
        """This rank's stream, at its beginning or where `states` (of all ranks) were taken."""
        stream = open_stream(
            index=self.train,
            recipe=self.recipe,
            world_rank=self.group.world.rank,
            world_size=self.group.world.size,
            streams=self.attempt.streams,
            encode=self.encode,
            collate=self.method.collate,
            # Compiled blocks are made anew for every shape.
            pad_to_full=self.recipe.train.compile,
        )
        if states is not None:
            stream.restore(states)
        return stream

    def begin_epoch_again(self, states: Mapping[str, Any]) -> EpochAgain:
        """Where the streams go on when the files are no longer those that `states` were taken on."""
        plans = plan_lanes(self.train, self.recipe.data, self.recipe.train, self.attempt.streams)
        return begin_epoch_again(states, plans)

    def notes(self) -> Iterator[str]:
        """What was decided for the user: row formats that were found from columns."""
        data = self.recipe.data
        held_out = () if isinstance(data.eval, EvalSplit) else data.eval
        infos = self.train.sources + (self.eval.sources if self.eval else ())
        for info, source in zip(infos, (*data.train, *held_out), strict=True):
            if source.format is None:
                yield f"source {info.name}: its rows are read as {info.format}, which its columns fit"

    def eval_sets(self) -> dict[str, Reader]:
        """Readers of the held-out sets by name."""
        data = self.recipe.data
        if isinstance(data.eval, EvalSplit):
            return {
                info.name: partial(self._eval_batches, self.train.select(number), data.eval.fraction)
                for number, info in enumerate(self.train.sources)
            }
        if self.eval is None:
            return {}
        return {
            info.name: partial(self._eval_batches, self.eval.select(number), None)
            for number, info in enumerate(self.eval.sources)
        }

    def _eval_batches(self, index: Index, fraction: float | None) -> Iterator[MicroBatch]:
        return iter(
            EvalBatches(
                index,
                data=self.recipe.data,
                world_rank=self.group.world.rank,
                world_size=self.group.world.size,
                micro_batch_size=self.recipe.train.micro_batch_size,
                encode=self.encode,
                collate=self.method.collate,
                held_out_fraction=fraction,
            )
        )


def open_data(recipe: Recipe, folder: ModelFolder, method: Method, attempt: Attempt, group: Group) -> RunData:
    """Find, index and verify the data on rank 0, and open it on every rank. Raises UserError."""
    group.from_main(partial(index_data, recipe, attempt.run), "indexing the data")
    train, evals = train_index(recipe.data), eval_index(recipe.data)
    template = None if recipe.model.chat_template is None else template_text(recipe.model.chat_template)
    return RunData(
        recipe=recipe,
        method=method,
        encoder=load_tokenizer(
            recipe.model.tokenizer or folder.url, recipe.model.revision, template, now=attempt.started_at
        ),
        attempt=attempt,
        group=group,
        train=load_index(attempt.run, train),
        eval=load_index(attempt.run, evals) if evals.sources else None,
        digest=digest_of(train, load_index(attempt.run, train)),
        vocabulary=folder.config.get("text_config", folder.config).get("vocab_size"),
    )
