"""Single checks of `ftlaunch check`, each with what must and must not be found."""

from __future__ import annotations

import numpy as np
import pytest

from ftlaunch.launcher.check_rows import LOOP_TOKENS, Vocabulary, longest_loop, sample_notes
from ftlaunch.launcher.check_text import any_of, pieces, text_notes
from ftlaunch.recipes.methods.base import RowId, Sample

VOCABULARY = Vocabulary(any_of([]), np.array([], np.int64), None, None, None)


def codes(text: str) -> set[str]:
    return {note.code for note in text_notes(list(pieces({"text": text})), any_of(["<|im_end|>", "</s>", "|"]))}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a </s> b", "special-token-in-text"),
        ("<|eot_id|>", "template-marks"),
        ("<start_of_turn>user", "template-marks"),
        ("<<SYS>> be nice <</SYS>>", "template-marks"),
        ("cafÃ©", "wrong-encoding"),
        ("itâ€™s", "wrong-encoding"),
        ("20Â°C", "wrong-encoding"),
        ("\u00c3\u00bc", "wrong-encoding"),
        ("lost \ufffd", "replacement-character"),
        ("nul \x00", "control-character"),
        ("next \x85 line", "control-character"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secret"),
        ("token ghp_" + "a1" * 18, "secret"),
    ],
)
def test_faulty_texts(text: str, code: str):
    assert codes(text) == {code}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a | b || c",
        "if a < b and b > c: print('<html>')",
        "São Paulo, Ã, naïve, Â, 20°C, “quoted” – it’s",
        "list[int], [INSTANCE], x[/INS]",
        "tabs\tand\r\nlines\f",
        "sk-short, AKIA, hf_x, 日本語 🙂",
    ],
)
def test_sound_texts(text: str):
    assert codes(text) == set()


def test_texts_are_found_wherever_they_stand():
    row = {
        "messages": [{"content": "a", "tool_calls": [{"function": {"arguments": {"x": "b"}}}]}],
        "n": 5,
        "none": None,
    }
    assert [(piece.place, piece.text) for piece in pieces(row)] == [
        ("messages[0].content", "a"),
        ("messages[0].tool_calls[0].function.arguments.x", "b"),
    ]


@pytest.mark.parametrize(
    ("pattern", "times", "period"), [([7], 64, 1), ([1, 2, 3], 40, 3), ([1, 2, 3, 4], 20, 4), (list(range(7)), 12, 7)]
)
def test_loops_are_found_with_their_shortest_period(pattern: list[int], times: int, period: int):
    ids = np.array([100, 101, *pattern * times, 200, 201], np.int32)
    loop = len(pattern) * times
    assert longest_loop(ids) == (loop, period)
    notes = list(sample_notes(Sample(ids, ids > 0, RowId("s", "f", 0, 0)), VOCABULARY))
    assert [note.detail for note in notes if note.code == "repetitive"] == [f"{loop} tokens long, {period} at a time"]


def test_what_does_not_repeat_is_no_loop():
    ids = np.random.default_rng(0).integers(0, 50, 5000).astype(np.int32)
    assert longest_loop(ids)[0] < LOOP_TOKENS
    assert list(sample_notes(Sample(ids, ids > 0, RowId("s", "f", 0, 0)), VOCABULARY)) == []
