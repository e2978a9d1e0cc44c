"""`ftlaunch check` and the sampling it shares with `plan --sample`."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from ftlaunch.distributed.data.template import load_tokenizer
from ftlaunch.launcher import cli
from ftlaunch.launcher.check import render_sample, spans
from ftlaunch.launcher.sampling import SAMPLE_ROWS, spread
from ftlaunch.recipes.methods.base import RowId, Sample

from .conftest import write_rows

GOOD = {"prompt": "what is one plus two ?", "completion": "three ."}
EMPTY = {"prompt": "what ?", "completion": " "}
LONG = {"prompt": "what is " + "one plus " * 10 + "?", "completion": "three ."}


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["check", "bot.yaml", *words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_counts_lengths_and_samples(capsys, place):
    code, said = check(capsys, "--samples", "1")
    assert code == 0
    wanted = ["10 rows read, 10 samples", "tokens in a sample: 9 to 9, median 9; 33.3% of 90 tokens supervised"]
    wanted += ["what is one plus two ?⟦ three . </s>⟧", "held-out (eval, text)"]
    assert [part for part in wanted if part not in said] == []
    assert said.count("what is one") == 1


def test_rejected_rows_are_counted_and_named_but_are_no_error(capsys, place):
    write_rows(place / "rows.jsonl", [GOOD, EMPTY, LONG, EMPTY, EMPTY, EMPTY])
    code, said = check(capsys)
    assert code == 0
    assert "4 rows rejected (67%): empty answer" in said
    assert "1 rows rejected (17%): overlong; longer than data.sequence_length" in said
    assert [f"row {number}\n" in said for number in (1, 2, 3, 4, 5)] == [True, True, True, True, False]


def test_truncation_is_counted(capsys, place):
    write_rows(place / "rows.jsonl", [GOOD, LONG])
    code, said = check(capsys, "data.overlong=truncate_left")
    assert code == 0
    assert "1 rows truncated" in said
    assert "9 to 16" in said


def test_split_documents_are_counted(capsys, place):
    write_rows(place / "rows.jsonl", [{"text": "one plus two is three . " * 10}])
    assert "1 rows split over several sequences" in check(capsys)[1]


def test_a_broken_line_is_named_with_its_number_and_exit_1(capsys, place):
    lines = [json.dumps(GOOD)] * 3
    lines[1] = '{"prompt": '
    (place / "rows.jsonl").write_text("\n".join(lines))
    code, said = check(capsys)
    assert code == 1
    assert "1 rows broken" in said
    assert "rows.jsonl, line 2: not valid JSON" in said
    assert "2 samples" in said


def test_a_malformed_row_is_broken(capsys, place):
    write_rows(place / "rows.jsonl", [GOOD, {"prompt": 5, "completion": "three"}])
    code, said = check(capsys)
    assert code == 1
    assert "row 1: prompt is int; expected text" in said


def test_too_long_is_broken_where_the_recipe_says_so(capsys, place):
    write_rows(place / "rows.jsonl", [GOOD, LONG])
    code, said = check(capsys, "data.overlong=error")
    assert code == 1
    assert "do not fit data.sequence_length 16" in said


def test_a_source_that_teaches_nothing_is_exit_1(capsys, place):
    write_rows(place / "rows.jsonl", [EMPTY])
    code, said = check(capsys)
    assert code == 1
    assert "nothing to learn from here" in said


def test_only_the_head_is_read(capsys, place):
    with (place / "rows.jsonl").open("a") as file:
        file.write("broken\n")
    assert check(capsys, "--rows", "10")[0] == 0
    assert check(capsys, "--rows", "11")[0] == 1


def test_a_model_out_of_reach_is_an_error(capsys, place):
    code, said = check(capsys, "model.path=./nowhere")
    assert code == 1
    assert "nowhere" in said


def sample(encoder, supervised: list[bool]) -> Sample:
    import numpy as np

    ids = [encoder.tokenizer.token_to_id(word) for word in ("what", "is", "one", "?")]
    return Sample(np.array(ids, np.int32), np.array(supervised), RowId("s", "f", 0, 0))


def test_spans_follow_the_mask_but_the_first_token_is_never_predicted(place):
    encoder = load_tokenizer("base")
    assert list(spans(sample(encoder, [True, True, False, True]), encoder)) == [
        ("what", False),
        (" is", True),
        (" one", False),
        (" ?", True),
    ]
    assert list(spans(sample(encoder, [False] * 4), encoder)) == [("what is one ?", False)]


def test_on_a_terminal_supervised_tokens_are_green_and_text_is_no_markup(place):
    encoder = load_tokenizer("base")
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    console.print(render_sample(sample(encoder, [False, False, False, True]), encoder, colours=True))
    assert "\x1b[1;32m ?\x1b[0m" in console.file.getvalue()


def test_secrets_in_paths_are_not_shown(capsys, place, monkeypatch):
    monkeypatch.setenv("TOKEN", "hidden-place")
    (place / "hidden-place").mkdir()
    write_rows(place / "hidden-place" / "rows.jsonl", [GOOD])
    code, said = check(capsys, "data.train.0.path=${TOKEN}/rows.jsonl")
    assert code == 0
    assert "hidden-place" not in said
    assert "REDACTED/rows.jsonl" in said


@pytest.mark.parametrize("count", [1, 2, 3, 10, 97, 100])
def test_blocks_are_visited_once_each_and_spread(count: int):
    order = list(spread(count))
    assert sorted(order) == list(range(count))
    if count == 100:
        assert max(order[:10]) - min(order[:10]) > 50


def test_a_sampled_plan_knows_steps_and_tokens(capsys, place):
    write_rows(place / "rows.jsonl", [GOOD] * 500)
    words = ["plan", "bot.yaml", "--json", "--sample", "train.max_steps=null", "train.num_epochs=2"]
    assert cli.main(words) == 0
    duration = json.loads(capsys.readouterr().out)["duration"]
    # 500 rows of 9 tokens in sequences of 16, 4 a step: 70.3 steps an epoch.
    assert duration["steps"] == 141
    assert duration["tokens"] == round(141 / 70.3125 * 4500)
    assert SAMPLE_ROWS > 500


def test_without_a_tokenizer_at_hand_the_reason_is_given(capsys, place):
    words = ["plan", "bot.yaml", "--json", "--sample", "model.path=someone/some-model", "train.max_steps=null"]
    assert cli.main(words) == 0
    assert "tokenizer of someone/some-model" in json.loads(capsys.readouterr().out)["duration"]["tokens"]
