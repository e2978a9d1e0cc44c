"""Rows read, encoded and fitted as training would do it, outside of training: for `check` and `plan --sample`. They are
spread over all files by a seed, or are all of them."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..distributed import storage
from ..distributed.data.block import Block
from ..distributed.data.cache import BlockCache
from ..distributed.data.index import Index
from ..distributed.data.intake import policies
from ..distributed.data.lanes import RowReader
from ..distributed.data.pack import fit
from ..distributed.data.template import TextEncoder, load_tokenizer
from ..recipes.errors import UserError
from ..recipes.methods.base import Method, Rejected, Row, RowId, Sample
from ..recipes.methods.table import build_method
from ..recipes.naming import source_names
from ..recipes.rows import Parsed, parse_row
from ..recipes.schema import Overlong, Recipe
from .plan_duration import SampleStats
from .plan_model import is_on_hub
from .unknown import Unknown, ask, then

SAMPLE_ROWS = 1_000
"""Rows of a source that an estimate is made from: the mean length is then within a few percent."""


POINTS = 48
"""Places at which a source is looked into; each costs a read of a whole block."""

READ_BYTES = 2**30
"""Large blocks (pandas writes whole files as one) are looked into at fewer places, so that about this much is read."""

LEAST_POINTS = 4
AHEAD, AHEAD_BYTES = 4, 64 * 2**20
"""Blocks that are read while another is looked at, and their stored bytes."""


class Fault(NamedTuple):
    """Why a row cannot be used at all: a code of `check_findings`, and the message."""

    code: str
    message: str


@dataclass(frozen=True)
class Looked:
    """One row and what became of it. `values`: the row under its standard names (None: unreadable); `sample`: the whole
    row encoded (None: not got that far); `fitted`: its pieces for sequences, the rejection, or the fault. `parsed`: the
    row where it is only read, because the method learns from no such rows; there are no pieces of it, then."""

    row: RowId
    values: Row | None
    sample: Sample | None
    fitted: list[Sample] | Rejected | Fault
    parsed: Parsed | None = None


class Eye:
    """Looks at rows of a source as training would: read, encoded, fitted into sequences. Whatever is wrong with a row
    is its own affair, so that the others can be looked at too. `method` None: rows are only read."""

    def __init__(
        self, index: Index, recipe: Recipe, overlong: Overlong, method: Method | None, encoder: TextEncoder
    ) -> None:
        self.index = index
        self.blocks = BlockCache(index.read_block)
        self._rows = RowReader(index, self.blocks)
        self._data, self._method, self._encoder = recipe.data, method, encoder
        self._overlong = overlong

    def look(self, block: int, row: int, decoded: Block) -> Looked:
        """One row of a decoded block."""
        row_id = self.index.row_id(block, row)
        try:
            values = self._rows.values(decoded, block, row)
        except UserError as error:
            return Looked(row_id, None, None, Fault("unreadable-row", str(error)))
        found = self._understand(values)
        if isinstance(found, Rejected | Fault):
            return Looked(row_id, values, None, found)
        if not isinstance(found, Sample):
            return Looked(row_id, values, None, [], found)
        sample = replace(found, row=row_id)
        try:
            fitted = fit(sample, self._data.sequence_length, self._overlong)
        except UserError as error:  # data.overlong: error
            return Looked(row_id, values, sample, Fault("overlong-refused", str(error)))
        return Looked(row_id, values, sample, fitted)

    def _understand(self, values: Row) -> Sample | Parsed | Rejected | Fault:
        """The row encoded; where no method learns from it, read; or what is wrong with it."""
        row_format = self.index.sources[0].format
        try:
            if self._method is None:
                return parse_row(values, row_format)
            return self._method.encode(values, row_format, self._encoder)
        except (UserError, ValueError) as error:
            return Fault("malformed-row", str(error))
        except Exception as error:  # training would end in a traceback here; name the row instead
            return Fault("malformed-row", f"{type(error).__name__}: {error}")


class Glimpse(NamedTuple):
    """A row that was looked at, the bytes it takes in its file (its block's, shared evenly), and the share of the work
    that is done."""

    looked: Looked
    num_bytes: float
    share: float


class Chosen(NamedTuple):
    """Rows chosen from a block, ascending, or why it cannot be read. `share`: of the work, done after them."""

    number: int
    block: Block | Fault
    rows: list[int]
    share: float


def look_at(eye: Eye, limit: int | None, seed: int) -> Iterator[Glimpse]:
    """Up to `limit` rows, None: all. A block that cannot be read is one row, with a Fault."""
    for chosen in choose(eye, limit, seed):
        if isinstance(chosen.block, Fault):
            yield Glimpse(Looked(eye.index.row_id(chosen.number, 0), None, None, chosen.block), 0.0, chosen.share)
            continue
        each = int(eye.index.order_bytes[chosen.number]) / max(1, chosen.block.num_rows)
        for row in chosen.rows:
            yield Glimpse(eye.look(chosen.number, row, chosen.block), each, chosen.share)


def choose(eye: Eye, limit: int | None, seed: int) -> Iterator[Chosen]:
    """Blocks with the rows to look at."""
    return _everything(eye) if limit is None else _sample(eye, limit, seed)


def _everything(eye: Eye) -> Iterator[Chosen]:
    used = eye.index.used_blocks
    done = np.cumsum(eye.index.order_bytes[used])
    for (number, block), so_far in zip(_read_ahead(eye, used.tolist()), done.tolist(), strict=True):
        rows = [] if isinstance(block, Fault) else list(range(block.num_rows))
        yield Chosen(number, block, rows, so_far / int(done[-1]))


def _sample(eye: Eye, limit: int, seed: int) -> Iterator[Chosen]:
    """First each chosen block gives its quota; then, where some held too few rows, all blocks give what they have left.
    The rows of a block are taken in a fixed random order, so that no row is taken twice."""
    quotas = row_quotas(eye.index, limit, seed)
    taken: Counter[int] = Counter()
    exhausted: set[int] = set()
    used = eye.index.used_blocks
    others = (int(used[place]) for place in spread(len(used)))
    for quota_of, numbers in ((quotas, sorted(quotas)), (None, others)):
        wanted = (number for number in numbers if number not in exhausted and taken.total() < limit)
        for number, block in _read_ahead(eye, wanted):
            left = limit - taken.total()
            if isinstance(block, Fault):
                exhausted.add(number)
                yield Chosen(number, block, [], taken.total() / limit)
            elif left > 0:
                order = np.random.default_rng([seed, number]).permutation(block.num_rows)
                quota = min(left, quota_of[number]) if quota_of else left
                rows = order[taken[number] : taken[number] + quota]
                taken[number] += len(rows)
                if taken[number] == block.num_rows:
                    exhausted.add(number)
                yield Chosen(number, block, sorted(rows.tolist()), taken.total() / limit)


def row_quotas(index: Index, limit: int, seed: int) -> dict[int, int]:
    """Rows to take from each block: points are set at random within equal stretches of all bytes (stratified sampling),
    and each gives the same number of rows, so that long files are looked at more than short ones."""
    used = index.used_blocks
    ends = np.cumsum(index.order_bytes[used])
    affordable = max(LEAST_POINTS, READ_BYTES // max(1, int(ends[-1]) // len(used)))
    points = min(limit, POINTS, affordable)
    places = (np.arange(points) + np.random.default_rng(seed).random(points)) * (int(ends[-1]) / points)
    blocks = used[np.minimum(np.searchsorted(ends, places, side="right"), len(used) - 1)]
    rows = np.full(points, limit // points) + (np.arange(points) < limit % points)
    return {int(block): int(rows[blocks == block].sum()) for block in np.unique(blocks)}


def _read_ahead(eye: Eye, numbers: Iterable[int]) -> Iterator[tuple[int, Block | Fault]]:
    """The blocks, a few of them read in the background; big ones are not."""
    waiting: deque[tuple[int, list[Future[Block]]]] = deque()
    ahead_bytes = 0
    for number in numbers:
        ahead_bytes += int(eye.index.order_bytes[number])
        waiting.append((number, eye.blocks.prefetch([number])))
        while len(waiting) > AHEAD or (waiting and ahead_bytes > AHEAD_BYTES):
            ahead_bytes -= int(eye.index.order_bytes[waiting[0][0]])
            yield _arrived(eye, waiting.popleft()[0])
    while waiting:
        yield _arrived(eye, waiting.popleft()[0])


def _arrived(eye: Eye, number: int) -> tuple[int, Block | Fault]:
    try:
        return number, eye.blocks.get(number)
    except UserError as error:
        return number, Fault("unreadable-file", str(error))


def make_encoder(recipe: Recipe, *, ask_hub: bool) -> TextEncoder | Unknown:
    """The recipe's tokenizer and chat template, without torch; Unknown where it is out of reach from here. Raises
    UserError for a tokenizer that cannot be used."""
    model = recipe.model
    path = model.tokenizer or model.path
    if not ask_hub and is_on_hub(path):
        return Unknown(f"the tokenizer of {path} is on a model hub, which plan does not ask")
    template, variables = model.chat_template, model.chat_template_kwargs
    if template is not None and template.endswith(".jinja"):
        template = storage.read_bytes(template).decode()
    revision = None if model.tokenizer else model.revision  # a revision is of the model's own repository
    return ask(path, lambda: load_tokenizer(path, revision, template, variables=variables))


def sample_sources(recipe: Recipe, indexes: Mapping[str, Index | Unknown]) -> dict[str, SampleStats] | Unknown:
    """Statistics by source name, for the sources that can be read; Unknown where there is no tokenizer at hand."""
    return then(make_encoder(recipe, ask_hub=False), lambda encoder: _sample_all(recipe, indexes, encoder))


def _sample_all(recipe: Recipe, indexes: Mapping[str, Index | Unknown], encoder: TextEncoder) -> dict[str, SampleStats]:
    method = build_method(recipe.method)
    sources = dict(zip(source_names(recipe.data.train), recipe.data.train, strict=True))
    found = {name: index for name, index in indexes.items() if isinstance(index, Index)}
    return {
        name: sample_source(
            Eye(index, recipe, policies(index, recipe.data, [sources[name]])[0], method, encoder), recipe.train.seed
        )
        for name, index in found.items()
    }


def sample_source(eye: Eye, seed: int) -> SampleStats:
    """From `SAMPLE_ROWS` rows. Raises UserError for a broken one."""
    rows = samples = tokens = 0
    num_bytes = 0.0
    for looked, row_bytes, _ in look_at(eye, SAMPLE_ROWS, seed):
        if isinstance(looked.fitted, Fault):
            raise UserError(looked.fitted.message)
        if isinstance(looked.fitted, list):
            samples += len(looked.fitted)
            tokens += sum(map(len, looked.fitted))
        rows += 1
        num_bytes += row_bytes
    eye.blocks.close()
    each = max(1, rows)
    return SampleStats(rows, samples / each, tokens / each, num_bytes / each)


def spread(count: int) -> Iterator[int]:
    """All of range(count), in an order whose first few are spread over it: files are often sorted by length or date."""
    step = max(1, round(count * 0.618))
    while math.gcd(step, count) > 1:
        step += 1
    return (number * step % count for number in range(count))
