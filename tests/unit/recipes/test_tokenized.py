"""Rows that are tokens already."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.recipes.rows import Tokenized, parse_row


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=70))
def test_lists_labels_and_bytes_say_the_same(tokens):
    ids, flags = [list(column) for column in zip(*tokens, strict=True)]
    rows = [
        {"input_ids": ids, "supervised": flags},
        {"input_ids": ids, "labels": [one if flag else -100 for one, flag in tokens]},
        {"input_ids": np.array(ids, "<i4").tobytes(), "supervised": np.packbits(flags).tobytes()},
    ]
    for row in rows:
        parsed = parse_row(row, "tokenized")
        assert isinstance(parsed, Tokenized)
        assert parsed.input_ids.dtype == np.int32 and parsed.input_ids.tolist() == ids
        assert parsed.supervised.dtype == np.bool_ and parsed.supervised.tolist() == flags


def test_without_flags_all_is_supervised():
    assert parse_row({"input_ids": [5, 6]}, "tokenized").supervised.all()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": "1 2"}, "expected a list of token ids"),
        ({"input_ids": [1, 2.5]}, "expected a list of token ids"),
        ({"input_ids": b"12345"}, "expected a list of token ids"),
        ({"input_ids": [1, 2, 3], "supervised": [True]}, "3 tokens, what is supervised 1"),
        ({"input_ids": [1, 2, 3], "supervised": ["yes"] * 3}, "expected true or false for every token"),
        ({"input_ids": [1] * 20, "supervised": b"\xff"}, "20 tokens, what is supervised 8"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "3 tokens, what is supervised 2"),
    ],
)
def test_malformed_ones_are_named(row, says):
    with pytest.raises(ValueError, match=says):
        parse_row(row, "tokenized")
