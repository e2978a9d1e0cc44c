"""Rows read, encoded and fitted as training would do it, outside of training: for `check` and `plan --sample`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..distributed import storage
from ..distributed.data.index import Index
from ..distributed.data.logical import SPLITTABLE
from ..distributed.data.pack import fit
from ..distributed.data.template import TextEncoder, load_tokenizer
from ..recipes.errors import UserError
from ..recipes.methods.base import Method, Rejected, RowId, Sample
from ..recipes.methods.table import build_method
from ..recipes.schema import Recipe
from .plan_duration import SampleStats
from .plan_model import is_on_hub
from .unknown import Unknown, ask, then

SAMPLE_ROWS = 1_000
"""Rows of a source that an estimate is made from: the mean length is then within a few percent."""


@dataclass(frozen=True)
class Looked:
    """One row and what became of it: `sample` is the whole row encoded (None: rejected while encoding), `fitted` its
    pieces for sequences, the rejection, or the message of what is broken about it."""

    row: RowId
    sample: Sample | None
    fitted: list[Sample] | Rejected | str


def look_at_rows(index: Index, recipe: Recipe, method: Method, encoder: TextEncoder, limit: int) -> Iterator[Looked]:
    """The first `limit` rows of a source with one index, in file order. A broken row is yielded as such; what makes a
    whole block unreadable is raised as UserError."""
    left = limit
    for block_number in range(index.num_blocks):
        block = index.read_block(block_number)
        for number in range(min(block.num_rows, left)):
            yield _look(index, block_number, number, block, recipe, method, encoder)
        left -= block.num_rows
        if left <= 0:
            return


def _look(
    index: Index, block_number: int, number: int, block: Any, recipe: Recipe, method: Method, encoder: TextEncoder
) -> Looked:
    source, row_id = index.sources[0], index.row_id(block_number, number)
    try:
        encoded = method.encode(source.standard_row(block.row(number)), source.format, encoder)
    except (UserError, ValueError) as error:
        return Looked(row_id, None, str(error))
    if isinstance(encoded, Rejected):
        return Looked(row_id, None, encoded)
    sample = replace(encoded, row=row_id)
    try:
        fitted = fit(sample, recipe.data.sequence_length, recipe.data.overlong, source.format in SPLITTABLE)
    except UserError as error:  # data.overlong: error
        return Looked(row_id, sample, str(error))
    return Looked(row_id, sample, fitted)


def make_encoder(recipe: Recipe, *, ask_hub: bool) -> TextEncoder | Unknown:
    """The recipe's tokenizer and chat template, without torch; Unknown where it is out of reach from here. Raises
    UserError for a tokenizer that cannot be used."""
    model = recipe.model
    path = model.tokenizer or model.path
    if not ask_hub and is_on_hub(path):
        return Unknown(f"the tokenizer of {path} is on a model hub, which plan does not ask")
    template = model.chat_template
    if template is not None and template.endswith(".jinja"):
        template = storage.read_bytes(template).decode()
    return ask(path, lambda: load_tokenizer(path, model.revision, template))


def sample_sources(recipe: Recipe, indexes: Mapping[str, Index | Unknown]) -> dict[str, SampleStats] | Unknown:
    """Statistics by source name, for the sources that can be read; Unknown where there is no tokenizer at hand."""
    return then(make_encoder(recipe, ask_hub=False), lambda encoder: _sample_all(recipe, indexes, encoder))


def _sample_all(recipe: Recipe, indexes: Mapping[str, Index | Unknown], encoder: TextEncoder) -> dict[str, SampleStats]:
    method = build_method(recipe.method)
    found = {name: index for name, index in indexes.items() if isinstance(index, Index)}
    return {name: sample_source(index, recipe, method, encoder) for name, index in found.items()}


def sample_source(index: Index, recipe: Recipe, method: Method, encoder: TextEncoder) -> SampleStats:
    """Encode rows from blocks spread over the source. Raises UserError for a broken row."""
    rows = samples = tokens = num_bytes = 0
    for block_number in spread(index.num_blocks):
        block = index.read_block(block_number)
        taken = min(block.num_rows, SAMPLE_ROWS - rows)
        for number in range(taken):
            looked = _look(index, block_number, number, block, recipe, method, encoder)
            if isinstance(looked.fitted, str):
                raise UserError(looked.fitted)
            if isinstance(looked.fitted, list):
                samples += len(looked.fitted)
                tokens += sum(map(len, looked.fitted))
        rows += taken
        num_bytes += round(int(index.block_bytes[block_number]) * taken / max(1, block.num_rows))
        if rows >= SAMPLE_ROWS:
            break
    each = max(1, rows)
    return SampleStats(rows, samples / each, tokens / each, num_bytes / each)


def spread(count: int) -> Iterator[int]:
    """All of range(count), in an order whose first few are spread over it: files are often sorted by length or date."""
    step = max(1, round(count * 0.618))
    while math.gcd(step, count) > 1:
        step += 1
    return (number * step % count for number in range(count))
