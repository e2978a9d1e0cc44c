"""A run's indexes: built when it first starts, and from then on what its files are compared with. No torch.

The launcher builds them where it sees the files itself, so that a mistake in a path is found before anything is
started; otherwise rank 0 does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..recipes.errors import UserError
from ..recipes.formats import require_readable
from ..recipes.naming import eval_names, source_names
from ..recipes.schema import Data, EvalSplit, Recipe, Source
from . import storage
from .checkpoint.commit import COMMITS
from .data.build import build_index, require_to_fit
from .data.changes import Changes, find_changes
from .data.index import Index
from .run_directory import RunDirectory

INDEX = "index"

ACCEPTED = "accept-changed-data"
"""A file that says: take the data as it is now, once."""


@dataclass(frozen=True)
class Indexed:
    """Sources that are indexed together. `prefix` names the index's files; `key` is their list in the recipe."""

    prefix: str
    sources: Sequence[Source]
    names: Sequence[str]
    key: str

    @property
    def keys(self) -> list[str]:
        """Where each source stands in the recipe."""
        return [f"{self.key}.{number}" for number in range(len(self.sources))]


def train_index(data: Data) -> Indexed:
    """The training sources."""
    return Indexed(_prefix("train", data.train), data.train, source_names(data.train), "data.train")


def eval_index(data: Data) -> Indexed:
    """The eval sources; none where evaluation data is split off the training data."""
    if isinstance(data.eval, EvalSplit):
        return Indexed(_prefix("eval", ()), (), (), "data.eval")
    return Indexed(_prefix("eval", data.eval), data.eval, eval_names(data), "data.eval")


def load_index(run: RunDirectory, indexed: Indexed) -> Index:
    """The index that counts: the latest of those that were made of these sources."""
    folder = run.path(INDEX)
    return Index.load(folder, _generations(folder, indexed.prefix)[-1])


def digest_of(indexed: Indexed, index: Index) -> str:
    """What a checkpoint's positions are positions in: these sources, with these files."""
    return f"{indexed.prefix}:{index.digest}"


def same_sources(digest: str, other: str) -> bool:
    """Whether two digests differ in their files at most."""
    return digest.partition(":")[0] == other.partition(":")[0]


def accept_changed_data(run: RunDirectory) -> None:
    """Let the next `index_data` of a run, wherever it happens, take the files as they are then."""
    storage.write_bytes(run.path(INDEX, ACCEPTED), b"")


def index_data(recipe: Recipe, run: RunDirectory, begin: Callable[[], None] = lambda: None) -> list[str]:
    """Build what is missing in the run directory, and make sure that files are still what a stored index says.

    Returns what became of files since, if the run may go on with them (`accept_changed_data`, or it has no checkpoint
    yet): then a new index lies beside the old one. Raises UserError that names the files otherwise.

    `begin` is called before the first index of a run is written: a mistake in a path leaves no directory behind."""
    folder = run.path(INDEX)
    accepted = run.path(INDEX, ACCEPTED)
    accept = storage.exists(accepted) or not _has_trained(run)
    notes: list[str] = []
    built: dict[str, Index] = {}
    for indexed in (train_index(recipe.data), eval_index(recipe.data)):
        generations = _generations(folder, indexed.prefix)
        if indexed.sources and not generations:
            index = build_index(indexed.sources, indexed.names, keys=indexed.keys)
            for info in index.sources:
                require_readable(info.format, recipe.method.type, f"source {info.name}")
            require_to_fit(index)
            built[indexed.prefix] = index
        elif indexed.sources:
            notes += _compare(indexed, folder, generations, accept=accept)
    begin()
    for prefix, index in built.items():
        index.save(folder, prefix)
    storage.delete_tree(accepted)
    return notes


def _compare(indexed: Indexed, folder: str, generations: Sequence[str], *, accept: bool) -> Iterator[str]:
    stored = Index.load(folder, generations[-1])
    current = stored.with_options(indexed.sources)
    changes = find_changes(current, indexed.sources)
    if changes:
        if not accept:
            raise _changed(changes)
        index = build_index(indexed.sources, indexed.names, keys=indexed.keys, known=current)
        index.save(folder, f"{indexed.prefix}.{len(generations)}")
        yield f"{indexed.key} is read as it is now:\n{changes}"
    elif current.sources != stored.sources:
        current.save(folder, generations[-1])


def _changed(changes: Changes) -> UserError:
    return UserError(
        f"the data is no longer what this run was started on:\n{changes}\nBring the files back, go on with the data as "
        "it is now with --accept-changed-data (the epoch begins again), or begin a new run with --fresh."
    )


def _has_trained(run: RunDirectory) -> bool:
    """Without a checkpoint nothing depends on what the files were."""
    return bool(storage.list_names(run.path(COMMITS)))


def _generations(folder: str, prefix: str) -> list[str]:
    """Names of the whole indexes of these sources, the oldest first: PREFIX, PREFIX.1, PREFIX.2 ..."""
    pattern = re.compile(rf"({re.escape(prefix)}(?:\.(\d+))?)\.blocks\.parquet")  # the blocks are written last
    matches = map(pattern.fullmatch, storage.list_names(folder))
    numbered = sorted((int(match[2] or 0), match[1]) for match in matches if match)
    return [name for _, name in numbered]


def _prefix(kind: str, sources: Sequence[Source]) -> str:
    """A name that changes with the sources, so that changed data never meets an old index."""
    key = repr([_what_is_read(source) for source in sources])
    return f"{kind}-{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}"


def _what_is_read(source: Source) -> tuple[object, ...]:
    rows = (source.skip, source.take) if source.skip or source.take is not None else ()
    part = (source.split, source.subset) if source.split or source.subset else ()
    return (source.path, source.format, sorted(source.columns.items()), *rows, *part)
