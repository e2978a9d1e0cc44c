"""Names that reports use for data sources."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .schema import Data, EvalSplit, Recipe, Source

_SUFFIXES = re.compile(r"(\.(jsonl?|ndjson|parquet|pq|arrow|feather|csv|tsv|txt|md|gz|zst))+$", re.IGNORECASE)
_GLOB = re.compile(r"[*?\[\]{}]")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


def source_name(source: Source) -> str:
    """The source's own name, or one made from its (first) path: the last part that is no mere pattern, without
    the file's suffix. `s3://acme/tickets/*.parquet` is `tickets`."""
    if source.name is not None:
        return source.name
    path = next(iter(source.paths), "")
    if path.startswith("hub:"):
        path = path.partition("@")[0]
    for part in reversed(path.partition("::")[0].partition("?*")[0].rpartition("://")[2].split("/")):
        name = _clean(part)
        if name:
            return name
    return "data"


def _clean(part: str) -> str:
    literal = _GLOB.split(_SUFFIXES.sub("", part))[0]
    return _NOT_IN_NAMES.sub("-", literal).strip("._-")


def source_names(sources: Sequence[Source]) -> tuple[str, ...]:
    """A name for every source, all different: names that were given stay, others get -2, -3 where needed. Names
    that were given twice stay twice; `checks.py` reports them."""
    taken = {source.name for source in sources if source.name is not None}
    names = []
    for source in sources:
        name = source.name or _free(source_name(source), taken)
        taken.add(name)
        names.append(name)
    return tuple(names)


def _free(name: str, taken: set[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    return candidate


def eval_names(data: Data) -> tuple[str, ...]:
    """Names of the eval sets: those of the eval sources; with {fraction: …} one held-out set per training source,
    with that source's name."""
    return source_names(data.train if isinstance(data.eval, EvalSplit) else data.eval)


def best_metric(recipe: Recipe) -> str | None:
    """The held-out loss that tells which checkpoint is best: that of early stopping, or the only one there is."""
    if recipe.evaluate.early_stopping is not None:
        return recipe.evaluate.early_stopping.metric
    names = eval_names(recipe.data)
    return f"{names[0]}/loss" if len(names) == 1 else None
