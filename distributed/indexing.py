"""A run's indexes: built when it first starts, and from then on what its files are compared with. No torch.

The launcher builds them where it sees the files itself, so that a mistake in a path is found before anything is
started; otherwise rank 0 does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..recipes.naming import eval_names, source_names
from ..recipes.schema import Data, EvalSplit, Source
from . import storage
from .data.index import Index, build_index, verify
from .run_directory import RunDirectory

INDEX = "index"


@dataclass(frozen=True)
class Indexed:
    """Sources that are indexed together. `prefix` names the index's files."""

    prefix: str
    sources: Sequence[Source]
    names: Sequence[str]


def train_index(data: Data) -> Indexed:
    """The training sources."""
    return Indexed(_prefix("train", data.train), data.train, source_names(data.train))


def eval_index(data: Data) -> Indexed:
    """The eval sources; none where evaluation data is split off the training data."""
    if isinstance(data.eval, EvalSplit):
        return Indexed(_prefix("eval", ()), (), ())
    return Indexed(_prefix("eval", data.eval), data.eval, eval_names(data))


def index_data(data: Data, run: RunDirectory) -> None:
    """Build what is missing in the run directory, and make sure that files are still what a stored index says. Raises
    UserError."""
    folder = run.path(INDEX)
    for indexed in (train_index(data), eval_index(data)):
        if not indexed.sources:
            continue
        if storage.exists(storage.join(folder, f"{indexed.prefix}.blocks.parquet")):
            verify(Index.load(folder, indexed.prefix))
        else:
            build_index(indexed.sources, indexed.names).save(folder, indexed.prefix)


def _prefix(kind: str, sources: Sequence[Source]) -> str:
    """A name that changes with the sources, so that changed data never meets an old index."""
    key = repr([_what_is_read(source) for source in sources])
    return f"{kind}-{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}"


def _what_is_read(source: Source) -> tuple[object, ...]:
    rows = (source.skip, source.take) if source.skip or source.take is not None else ()
    return (source.path, source.format, sorted(source.columns.items()), *rows)
