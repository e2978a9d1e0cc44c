"""What lies at the recipe's sources: counts are exact where file footers tell, unknown where only reading would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..distributed import storage
from ..distributed.data.build import build_index
from ..distributed.data.hub import is_pinned
from ..distributed.data.index import Index
from ..recipes.naming import source_names
from ..recipes.schema import EvalSplit, Recipe, Source, TrainSource
from .unknown import Unknown, ask

COUNTED_WHILE_READING = Unknown("rows of these files are counted only while reading; `--sample` estimates them")


@dataclass(frozen=True)
class SourcePlan:
    """What lies at one source. `split` is "train" or "eval"; `weight` 0 where sources are served in full."""

    name: str
    split: str
    path: str
    format: str
    files: int
    bytes: int
    rows: int | Unknown
    blocks: int
    weight: float = 0.0
    format_is_found: bool = False
    """The recipe does not say the format; the columns fit only this one."""


def index_source(source: Source, name: str, key: str = "") -> Index | Unknown:
    """The index of one source, which stands at `key` in the recipe. Raises UserError for a place in reach that holds no
    usable data."""
    options = storage.options_text(source.storage_options)
    for path in source.paths:
        if is_pinned(path):
            return Unknown(f"{path} is on a hub, which plan does not ask")
        reached = ask(path, lambda: True, options)
        if isinstance(reached, Unknown):
            return reached
    return ask(source.paths[0], lambda: build_index([source], [name], keys=[key]), options)


def named_sources(recipe: Recipe) -> list[tuple[str, str, Source]]:
    """(split, name, source) of all sources; a held-out fraction has no sources of its own."""
    train = zip(source_names(recipe.data.train), recipe.data.train, strict=True)
    found: list[tuple[str, str, Source]] = [("train", name, source) for name, source in train]
    if not isinstance(recipe.data.eval, EvalSplit):
        evals = zip(source_names(recipe.data.eval), recipe.data.eval, strict=True)
        found += [("eval", name, source) for name, source in evals]
    return found


def keys_of(recipe: Recipe) -> Iterator[str]:
    """Where the sources of `named_sources` stand in the recipe."""
    yield from (f"data.train.{number}" for number in range(len(recipe.data.train)))
    if not isinstance(recipe.data.eval, EvalSplit):
        yield from (f"data.eval.{number}" for number in range(len(recipe.data.eval)))


def describe(split: str, name: str, source: Source, index: Index) -> SourcePlan:
    """A source's line in the plan."""
    rows = index.num_rows(0)
    return SourcePlan(
        name=name,
        split=split,
        path=", ".join(source.paths),
        format=index.sources[0].format,
        files=len(index.files),
        bytes=round(sum(file.size for file in index.files) * _used_share(index)),
        rows=COUNTED_WHILE_READING if rows is None else rows,
        blocks=index.num_blocks,
        weight=(source.weight or 0.0) if isinstance(source, TrainSource) else 0.0,
        format_is_found=source.format is None,
    )


def _used_share(index: Index) -> float:
    """Share of the bytes that `skip` and `take` leave."""
    return float(index.order_bytes[index.used_blocks].sum() / index.block_bytes.sum())
