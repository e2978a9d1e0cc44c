"""Rows looked at some at a time: which are prepared, and that nothing else changes."""

from __future__ import annotations

from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streams import bins_of, collate
from tokenizers import Tokenizer, models, pre_tokenizers

from ftlaunch.distributed.data.ahead import AHEAD_CHARACTERS, AHEAD_ROWS, Drawn, look_ahead
from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.stream import open_stream
from ftlaunch.distributed.row_encoder import EncoderSpec, open_encoder
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema import Recipe


class Tokenizing:
    """An encoder of rows whose tokenizer notes what it prepares."""

    def __init__(self):
        self.tokenizer = self
        self.prepared = []

    def prepare(self, texts):
        self.prepared.append(list(texts))


def texts(count, *, length=3, broken_at=None, held_out=()):
    for number in range(count):
        if number == broken_at:
            raise UserError("a broken row")
        yield Drawn(0, number, {"text": "x" * length}, number not in held_out)


def test_many_texts_are_prepared_at_once_but_those_held_out():
    encoder = Tokenizing()
    taken = look_ahead(encoder, lambda block: "text")(texts(100, held_out={1, 2}))
    assert [drawn.row for drawn in taken] == list(range(AHEAD_ROWS))
    assert [len(some) for some in encoder.prepared] == [AHEAD_ROWS - 2]


def test_long_texts_are_not_gathered():
    encoder = Tokenizing()
    look = look_ahead(encoder, lambda block: "text")
    assert len(look(texts(100, length=AHEAD_CHARACTERS // 2))) == 3
    assert len(look(texts(100, length=2 * AHEAD_CHARACTERS))) == 1
    assert len(encoder.prepared) == 1, "one text by itself is not worth it"


def test_rows_before_a_broken_one_are_served_first():
    look = look_ahead(Tokenizing(), lambda block: "text")
    assert len(look(texts(9, broken_at=4))) == 4
    with pytest.raises(UserError, match="a broken row"):
        look(texts(9, broken_at=0))


def test_rows_of_other_formats_and_without_text_come_by_themselves():
    encoder = Tokenizing()
    assert len(look_ahead(encoder, lambda block: "chat")(texts(9))) == 1
    assert len(look_ahead(encoder, lambda block: "text")(iter([Drawn(0, 0, {"text": None}), *texts(9)]))) == 1
    assert len(look_ahead(lambda row, row_format: None, lambda block: "text")(texts(9))) == 1
    assert encoder.prepared == []


@pytest.fixture
def encoder(tmp_path):
    words = ["<e>", "<b>", *(f"w{number}" for number in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<e>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    return str(tmp_path / "tokenizer")


def steps_and_states(recipe, encode):
    """All bins and states of a run that is stopped after three steps and goes on."""
    index = build_index(recipe.data.train, ["s"])

    def opened():
        return open_stream(
            index=index, recipe=recipe, world_rank=0, world_size=1, streams=2, encode=encode, collate=collate
        )

    stream, seen = opened(), []
    for _ in range(3):
        seen.append((bins_of(stream.next_step()), stream.state()))
    states = stream.state()
    stream.close()
    stream = opened()
    stream.restore(states)
    while (step := stream.next_step()).num_bins:
        seen.append((bins_of(step), stream.state()))
    stream.close()
    return seen


def test_steps_and_states_are_those_of_rows_encoded_one_by_one(tmp_path, encoder):
    rows = [" ".join(f"w{(number * step) % 50}" for step in range(number % 9)) for number in range(400)]
    rows += ["w1 w2"] * 100  # the same text many times
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": rows}), tmp_path / "data/a.parquet", row_group_size=90)
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "model": {"path": encoder},
            "method": {"type": "cpt"},
            "data": {
                "sequence_length": 32,
                "pack_buffer": 8,
                "train": [{"path": str(tmp_path / "data"), "format": "text"}],
                "eval": {"fraction": 0.1},
            },
            "train": {"global_batch_size": 2, "num_epochs": 2},
        }
    )
    at_once = open_encoder(EncoderSpec(recipe.method, encoder, None, {}, datetime(2025, 1, 1), None))
    one_by_one = open_encoder(EncoderSpec(recipe.method, encoder, None, {}, datetime(2025, 1, 1), None))

    def without_tokenizer(row, row_format):
        return one_by_one(row, row_format)

    found = steps_and_states(recipe, at_once)
    assert found == steps_and_states(recipe, without_tokenizer)
    assert len(found) > 20
    assert not at_once.tokenizer._prepared, "nothing is prepared that is not used"
