"""A run's data, put together: its index in the run directory, its training stream, its eval sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..recipes.methods.base import Method, Rejected, Row, Sample
from ..recipes.naming import eval_names, source_names
from ..recipes.schema import EvalSplit, Recipe, RowFormat, Source
from . import storage
from .attempt import Attempt
from .data.evaluation import EvalBatches
from .data.index import Index, build_index, verify
from .data.stream import MicroBatch, Stream, open_stream
from .data.template import load_tokenizer
from .evaluate import Reader
from .group import Group
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

    def encode(self, row: Row, row_format: RowFormat) -> Sample | Rejected:
        """A row as the method learns from it."""
        return self.method.encode(row, row_format, self.encoder)

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
    evals = () if isinstance(recipe.data.eval, EvalSplit) else recipe.data.eval
    train_prefix, eval_prefix = _prefix("train", recipe.data.train), _prefix("eval", evals)
    index_folder = attempt.run.path("index")

    def index() -> None:
        _index(recipe.data.train, source_names(recipe.data.train), index_folder, train_prefix)
        if evals:
            _index(evals, eval_names(recipe.data), index_folder, eval_prefix)

    group.from_main(index, "indexing the data")
    template = None if recipe.model.chat_template is None else template_text(recipe.model.chat_template)
    return RunData(
        recipe=recipe,
        method=method,
        encoder=load_tokenizer(recipe.model.tokenizer or folder.url, recipe.model.revision, template),
        attempt=attempt,
        group=group,
        train=Index.load(index_folder, train_prefix),
        eval=Index.load(index_folder, eval_prefix) if evals else None,
        digest=train_prefix,
    )


def _index(sources: Sequence[Source], names: Sequence[str], folder: str, prefix: str) -> None:
    """Build the index at a run's first start; later make sure that the files are still what it says."""
    if storage.exists(storage.join(folder, f"{prefix}.blocks.parquet")):
        verify(Index.load(folder, prefix))
    else:
        build_index(sources, names).save(folder, prefix)


def _prefix(kind: str, sources: Sequence[Source]) -> str:
    """A name that changes with the sources, so that changed data never meets an old index."""
    key = repr([(source.path, source.format, sorted(source.columns.items())) for source in sources])
    return f"{kind}-{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}"
