"""Rows tokenised ahead: parquet shards of samples, which the stream reads without a tokenizer. No torch.

A source is cut into pieces of equal bytes, each piece becomes one shard, and a shard's name and content depend on the
data and the recipe alone, so pieces can be made anywhere in any order, and again after a failure. Samples are whole:
they are fitted to `data.sequence_length` but packed by the stream, which costs it next to nothing, keeps every sample
its own place in the shuffle, and lets weights and seeds change afterwards.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..recipes.errors import UserError
from ..recipes.methods.base import Sample
from ..recipes.redact import written_values
from ..recipes.schema import Data, EvalSplit, Recipe, Source
from . import storage
from .data import columnar, counters
from .data.cache import BlockCache
from .data.held_out import held_out
from .data.index import Index
from .data.intake import policies
from .data.lane_plan import ALL_SOURCES, Keep
from .data.lanes import LaneReader, RowReader
from .data.logical import Lane, LogicalStream
from .data.order import LaneOrder
from .row_encoder import RowEncoder

PIECE_BYTES = 32 * 2**20
"""Stored bytes that become one shard: seconds to a minute of work, held in memory at once."""

GROUP_TOKENS = 2**18
"""Tokens of a row group, about a MiB: blocks that are small beside a stream's segment."""

ONCE = Fraction(1)

METADATA = b"ftlaunch.prepared"

NOT_IN_SHARDS = {
    *("path", "storage_options", "format", "overlong"),  # what they amount to is digested in their place
    *("name", "weight", "primary", "repeat", "num_epochs"),  # what the run still decides
}
"""Keys of a source that do not themselves change what its shards hold."""

Kind = Literal["train", "eval"]


@dataclass(frozen=True)
class Piece:
    """Part `number` of `count` of a source. `kind`: what its rows are for; with a held-out fraction, the training
    source's own rows serve both."""

    kind: Kind
    source: int
    name: str
    number: int
    count: int

    @property
    def folder(self) -> str:
        """Of the source's shards, below the folder that is written to."""
        return f"{self.kind}/{self.name}"

    @property
    def path(self) -> str:
        """The shard's, below the folder that is written to."""
        return f"{self.folder}/part-{self.number:05d}-of-{self.count:05d}.parquet"


@dataclass(frozen=True)
class Prepared:
    """A piece that is done. `counts`: as the run's report has them; `rejected`: some of the refused rows, in words."""

    piece: Piece
    counts: dict[str, int]
    rejected: list[str]
    nbytes: int
    was_there: bool = False
    """From an earlier try."""


@dataclass(frozen=True)
class Preparation:
    """What every piece is made with. `encoder`: digest of what turns rows into tokens (`encoder_digest`)."""

    data: Data
    train: Index
    eval: Index | None
    encoder: str
    to: str

    def pieces(self) -> list[Piece]:
        """All of them."""
        kinds: list[tuple[Kind, Index]] = [("train", self.train)]
        if self.fraction is not None:
            kinds.append(("eval", self.train))
        elif self.eval is not None:
            kinds.append(("eval", self.eval))
        return [piece for kind, index in kinds for piece in _pieces(kind, index)]

    @property
    def fraction(self) -> float | None:
        """The held-out share of the training rows, where that is how evaluation data is found."""
        return self.data.eval.fraction if isinstance(self.data.eval, EvalSplit) else None

    def source_of(self, piece: Piece) -> Source:
        """The recipe's source that a piece is of."""
        own_eval = piece.kind == "eval" and not isinstance(self.data.eval, EvalSplit)
        return self.data.eval[piece.source] if own_eval else self.data.train[piece.source]  # type: ignore[index]

    def index_of(self, piece: Piece) -> Index:
        """The index that a piece's source is of."""
        index = self.train if piece.kind == "train" or self.eval is None else self.eval
        return index.select(piece.source)

    @cached_property
    def digests(self) -> dict[str, str]:
        """`KIND/NAME` of each source -> a digest of everything that the content of its shards depends on."""
        return {piece.folder: self._digest(piece) for piece in self.pieces() if piece.number == 0}

    def _digest(self, piece: Piece) -> str:
        source, index = self.source_of(piece), self.index_of(piece)
        how = source.model_dump(mode="json", exclude=NOT_IN_SHARDS)
        overlong = policies(index, self.data, [source])[0]
        files = [(file.url, file.size, file.etag) for file in index.files]
        rows = [piece.kind, self.fraction, index.sources[0].format, overlong, how, files]
        return _digest([self.encoder, self.data.sequence_length, rows])

    def keeps(self, piece: Piece) -> Keep:
        """Which rows of its source a piece takes."""
        fraction = self.fraction
        if fraction is None:
            return lambda _: True
        return lambda row: held_out(row, fraction) == (piece.kind == "eval")


def _pieces(kind: Kind, index: Index) -> Iterator[Piece]:
    for source, info in enumerate(index.sources):
        mine = index.used_blocks[index.block_source[index.used_blocks] == source]
        count = max(1, -(-int(index.order_bytes[mine].sum()) // PIECE_BYTES))
        for number in range(count):
            yield Piece(kind, source, info.name, number, count)


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def encoder_digest(encode: RowEncoder) -> str:
    """Of tokenizer, chat template and method: what else a row's tokens depend on."""
    tokenizer, spec = encode.tokenizer, encode.spec
    template = tokenizer.chat_template.source if tokenizer.chat_template else None
    method, special = spec.method.model_dump(mode="json"), dict(tokenizer.special_tokens)
    return _digest([tokenizer.tokenizer.to_str(), template, dict(spec.chat_template_kwargs), method, special])


def prepare_piece(preparation: Preparation, piece: Piece, encode: RowEncoder) -> Prepared:
    """Tokenise a piece and write its shard, unless it is there. Raises UserError for a malformed row and for a shard
    that was made of something else."""
    url = storage.join(preparation.to, piece.path)
    if storage.exists(url):
        return _done(preparation, piece, url)
    stream = _open(preparation, piece, encode)
    shard = _Shard()
    while samples := stream.next_bin().samples:
        shard.add(samples[0])
    counts = stream.counts.get(piece.name, {})
    rejected = [f"{row}: {refused.reason}" for row, refused in stream.rejections]
    content = shard.content(
        {
            "digest": preparation.digests[piece.folder],
            "encoder": preparation.encoder,
            "sequence_length": preparation.data.sequence_length,
            "counts": counts,
            "rejected": rejected,
        }
    )
    storage.write_bytes(url, content)
    return Prepared(piece, counts, rejected, len(content))


def _open(preparation: Preparation, piece: Piece, encode: RowEncoder) -> LogicalStream:
    """The piece's rows in file order, each once, fitted and counted as a run does it, one sample a bin."""
    index = preparation.index_of(piece)
    rows = RowReader(index, BlockCache(index.read_block))
    blocks = index.used_blocks
    order = LaneOrder(ALL_SOURCES, index.order_bytes[blocks], streams=piece.count, seed=0, shuffle=False)
    reader = LaneReader(order, blocks, stream=piece.number, rows=rows, keep=preparation.keeps(piece), max_epochs=ONCE)
    data = preparation.data.model_copy(update={"packing": False})
    overlong = policies(index, data, [preparation.source_of(piece)])
    return LogicalStream([Lane(ALL_SOURCES, reader, 1, True)], rows, data, encode, overlong)


def _done(preparation: Preparation, piece: Piece, url: str) -> Prepared:
    about = read_about(storage.info(url))
    if about is None or about["digest"] != preparation.digests[piece.folder]:
        raise UserError(
            f"{url}: was prepared from other rows, or with another tokenizer, template, method or sequence length. "
            "Remove the folder, or prepare to another one."
        )
    return Prepared(piece, about["counts"], about["rejected"], storage.info(url).size, was_there=True)


def read_about(file: storage.FileInfo) -> dict[str, Any] | None:
    """What a shard says of its making; None for a parquet file that was not prepared here."""
    metadata: Mapping[bytes, bytes] = columnar.read_metadata(file)
    about: dict[str, Any] | None = json.loads(metadata[METADATA]) if METADATA in metadata else None
    return about


class _Shard:
    """Samples as a parquet file: tokens as the bytes of little-endian int32, what is supervised as bits."""

    def __init__(self) -> None:
        self._ids: list[bytes] = []
        self._supervised: list[bytes] = []
        self._tokens = 0
        self._groups: list[Any] = []

    def add(self, sample: Sample) -> None:
        """One row more."""
        self._ids.append(np.ascontiguousarray(sample.input_ids, "<i4").tobytes())
        self._supervised.append(np.packbits(sample.supervised).tobytes())
        self._tokens += len(sample)
        if self._tokens >= GROUP_TOKENS:
            self._end_group()

    def content(self, about: Mapping[str, Any]) -> bytes:
        """The file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._end_group()
        schema = pa.schema(
            [("input_ids", pa.binary()), ("supervised", pa.binary())], metadata={METADATA: json.dumps(about).encode()}
        )
        file = io.BytesIO()
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer:
            for group in self._groups:
                writer.write_table(group.cast(schema))
        return file.getvalue()

    def _end_group(self) -> None:
        import pyarrow as pa

        if self._ids:
            columns = [pa.array(self._ids, pa.binary()), pa.array(self._supervised, pa.binary())]
            self._groups.append(pa.table(columns, names=["input_ids", "supervised"]))
        self._ids, self._supervised, self._tokens = [], [], 0


def prepared_recipe(recipe: Recipe, preparation: Preparation) -> dict[str, Any]:
    """The recipe over the shards: what was done ahead (formats, ranges, splits) is gone, the rest stays."""
    values = written_values(recipe)
    data = values["data"]
    for source, info in zip(data["train"], preparation.train.sources, strict=True):
        _over_shards(source, "train", info.name, preparation.to)
    if preparation.fraction is not None:
        data["eval"] = [{} for _ in preparation.train.sources]
    names = preparation.train.sources if preparation.eval is None else preparation.eval.sources
    for source, info in zip(data.get("eval", ()), names, strict=False):
        _over_shards(source, "eval", info.name, preparation.to)
    return values | {"data": data}


def _over_shards(source: dict[str, Any], kind: Kind, name: str, to: str) -> None:
    for done in ("columns", "skip", "take", "split", "subset", "storage_options"):
        source.pop(done, None)
    source.update(name=name, path=storage.join(to, kind, name), format="tokenized")


def check_prepared(index: Index, key: str, encode: RowEncoder, sequence_length: int) -> None:
    """Raises UserError when a source's shards were prepared for other tokens than those of this run."""
    for number, info in enumerate(index.sources):
        mine = index.select(number)
        if info.format != "tokenized" or mine.file_kind[0] != "parquet":
            continue
        about = read_about(mine.files[0])
        if about is None:
            continue
        where = f"{key}.{number} ({mine.files[0].url})"
        if about["encoder"] != encoder_digest(encode):
            raise UserError(
                f"{where}: was prepared with another tokenizer, chat template or method than this recipe has. "
                "Prepare it again, or set them back."
            )
        if about["sequence_length"] != sequence_length:
            raise UserError(
                f"{where}: was prepared for data.sequence_length {about['sequence_length']}, and the recipe says "
                f"{sequence_length}. Set it back, or prepare again."
            )


def counts_by_source(done: list[Prepared]) -> dict[str, dict[str, int]]:
    """`KIND/NAME` -> its counters, summed over the pieces."""
    return counters.total({one.piece.folder: one.counts} for one in done)
