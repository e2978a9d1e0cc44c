"""`ftlaunch check` and the sampling it shares with `plan --sample`."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from ftlaunch.distributed.data.build import build_index
from ftlaunch.distributed.data.template import load_tokenizer
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.launcher import cli
from ftlaunch.launcher.check_progress import Progress
from ftlaunch.launcher.check_view import render_sample, spans
from ftlaunch.launcher.sampling import SAMPLE_ROWS, Eye, look_at, spread
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.load import load_recipe
from ftlaunch.recipes.methods.base import RowId, Sample
from ftlaunch.recipes.methods.table import build_method

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
    wanted = [" B; all 10 rows looked at", "10 samples; 33.3% of 90 tokens supervised"]
    wanted += ["tokens in a sample: 9 to 9, median 9, 95% up to 9", "9 │█│ 9", "held-out (eval, text)"]
    wanted += ["what is one plus two ?⟦ three . </s>⟧", "report: ./runs/bot/check.html"]
    assert [part for part in wanted if part not in said] == []
    assert said.count("what is one") == 1


def test_left_out_rows_are_counted_and_named_but_are_no_error(capsys, place):
    write_rows(place / "rows.jsonl", [GOOD, EMPTY, LONG, EMPTY, EMPTY, EMPTY])
    code, said = check(capsys)
    assert code == 0
    assert "4 rows (66.7%): left out, because nothing is learned from it (empty answer" in said
    assert "1 row (16.7%): the prompt alone fills data.sequence_length" in said
    assert [f"row {number}\n" in said for number in (1, 3, 4, 5)] == [True] * 4
    assert re.search(r"row 2: \d+ tokens, \d+ of them before the answer", said)


def test_strict_fails_on_warnings_but_not_on_advice(capsys, place):
    write_rows(place / "rows.jsonl", [GOOD, EMPTY])
    assert check(capsys)[0] == 0
    assert check(capsys, "--strict")[0] == 1
    sums = itertools.product(("one", "two", "three"), repeat=5)
    rows = [{"prompt": f"what is {' plus '.join(sum_)} ?", "completion": f"{sum_[0]} ."} for sum_ in sums]
    write_rows(place / "rows.jsonl", rows)
    code, said = check(capsys, "--strict", "train.max_steps=40", "data.eval=[]")
    assert "no-eval" in said
    assert code == 0, said


def test_words_that_the_tokenizer_does_not_know_are_found(capsys, place):
    write_rows(place / "rows.jsonl", [GOOD, {"prompt": "what is nine plus ten ?", "completion": "three ."}])
    said = check(capsys)[1]
    assert "unknown-token" in said
    assert "row 1: 2 of 9 tokens" in said


def test_split_documents_are_counted(capsys, place):
    write_rows(place / "rows.jsonl", [{"text": "one plus two is three . " * 10}])
    assert "1 row (100.0%): documents split over several sequences" in check(capsys)[1]


def test_all_broken_rows_are_named_not_only_the_first(capsys, place):
    lines = [json.dumps(GOOD)] * 5
    lines[1] = lines[3] = '{"prompt": '
    lines[4] = json.dumps({"prompt": 5, "completion": "three"})
    (place / "rows.jsonl").write_text("\n".join(lines))
    code, said = check(capsys)
    assert code == 1
    assert "2 rows (40.0%): not a row" in said
    assert "row 1: line 2: not valid JSON" in said
    assert "row 3: line 4: not valid JSON" in said
    assert re.search(r"row 4: .*prompt.*int", said)
    assert "2 samples" in said


def test_one_reason_for_many_rows_is_not_repeated_for_each(capsys, place):
    write_rows(place / "rows.jsonl", [{"messages": [{"role": "user", "content": f"what is {n}"}]} for n in range(40)])
    code, said = check(capsys, "method.train_on=all")
    assert code == 1
    assert said.count("has no chat template") == 3
    assert "… 37 more" in said


def test_a_source_that_teaches_nothing_is_exit_1(capsys, place):
    write_rows(place / "rows.jsonl", [EMPTY])
    code, said = check(capsys)
    assert code == 1
    assert "teaches-nothing" in said


def test_a_source_that_is_not_there_does_not_hide_the_others(capsys, place):
    code, said = check(capsys, "data.eval.0.path=nowhere.jsonl")
    assert code == 1
    assert "unreadable-source" in said
    assert "10 samples" in said


def test_rows_are_taken_from_everywhere_not_from_the_head(capsys, place):
    (place / "rows").mkdir()
    for file in range(8):
        rows = [{"prompt": f"what is {file} {row} ?", "completion": "three ."} for row in range(100)]
        write_rows(place / "rows" / f"{file}.jsonl", rows)
    words = ("data.train.0.path=rows", "--rows", "40", "--samples", "40", "--json")
    assert cli.main(["check", "bot.yaml", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"][0]["rows_looked_at"] == 40
    assert found["sources"][0]["files"] == 8
    assert abs(found["sources"][0]["rows_estimated"] - 800) < 40
    # Every row is of 8 tokens: five words of the prompt, two of the answer, and its end.
    assert found["sources"][0]["tokens"] == 40 * 8
    assert abs(found["sources"][0]["tokens_estimated"] - 800 * 8) < 40 * 8
    said = check(capsys, *words[:-1])[1]
    assert re.search(r"\n  8 files, .*; 40 of about \d+ rows looked at", said)
    assert re.search(r"supervised; about 6,\d{3} tokens in all\n", said)
    page = (place / "runs" / "bot" / "check.html").read_text()
    assert all(f"/rows/{file}.jsonl" in page for file in range(8))
    rows = [int(number) for number in re.findall(r"rows/\d\.jsonl, row (\d+) ·", page)]
    assert min(rows) < 25 < 75 < max(rows)


def test_fewer_rows_than_wanted_are_all_taken_from_uneven_files(place):
    (place / "rows").mkdir()
    for file, rows in enumerate((1, 300, 2, 90)):
        write_rows(place / "rows" / f"{file}.jsonl", [GOOD] * rows)
    recipe = load_recipe(place / "bot.yaml", ["data.train.0.path=rows"], environ={}).recipe
    index = build_index(recipe.data.train, ["rows"])
    eye = Eye(index, recipe, "drop", build_method(recipe.method), load_tokenizer("base"))
    for limit in (1, 5, 200, 392, 393, 500, None):
        looked = [glimpse.looked.row for glimpse in look_at(eye, limit, seed=3)]
        assert len(looked) == len(set(looked)) == min(limit or 500, 393)
    assert {row.file for row in looked} == {file.url for file in index.files}


def test_the_rows_wanted_must_be_some(capsys, place):
    assert check(capsys, "--rows", "0")[0] == 1
    assert check(capsys, "--rows", "most")[0] == 1


def test_the_report_goes_where_it_is_asked_and_an_unwritable_place_fails_only_then(capsys, place):
    assert check(capsys, "--report", "here.html")[0] == 0
    assert "</html>" in (place / "here.html").read_text()
    assert not (place / "runs").exists()
    (place / "file").write_text("")
    code, said = check(capsys, "checkpoint.path=file")
    assert (code, "report: not written" in said) == (0, True)
    assert check(capsys, "--report", "file/here.html")[0] != 0


def test_a_run_may_begin_where_only_a_check_has_been(capsys, place):
    assert check(capsys)[0] == 0
    RunDirectory("runs/bot").check()
    (place / "runs" / "bot" / "other.html").write_text("")
    with pytest.raises(UserError, match=r"holds other\.html"):
        RunDirectory("runs/bot").check()


def test_control_characters_do_not_reach_the_terminal(capsys, place):
    write_rows(place / "rows.jsonl", [{"prompt": "what \x1b[31m ?", "completion": "\x1b]0;title\x07 three ."}])
    said = check(capsys)[1]
    assert "\x1b" not in said
    assert "\x07" not in said


def test_check_imports_no_torch(place):
    script = "import sys; from ftlaunch.launcher import cli; code = cli.main(['check', 'bot.yaml']); "
    script += "print(sorted({'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules)), code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=place)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_progress_shows_itself_only_after_a_while_and_is_wiped():
    now, out = [0.0], io.StringIO()
    progress = Progress(out, drawn_over=True, clock=lambda: now[0])
    progress.update("tickets", 10, 0.1)
    assert out.getvalue() == ""
    now[0] = 10.0
    progress.update("tickets", 1000, 0.25)
    assert out.getvalue() == "\rtickets: 1,000 rows, 25%, about 30 s left"
    progress.update("tickets", 1001, 0.25)
    progress.done()
    assert out.getvalue().endswith("\r" + " " * len("tickets: 1,000 rows, 25%, about 30 s left") + "\r")


def test_progress_in_a_log_is_a_line_now_and_then():
    now, out = [0.0], io.StringIO()
    progress = Progress(out, drawn_over=False, clock=lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        progress.update("tickets", second, 0.001)
    progress.done()
    assert out.getvalue() == "".join(f"tickets: {second} rows, 0%\n" for second in (3, 33, 63, 93))


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
    page = (place / "runs" / "bot" / "check.html").read_text()
    for shown in (said, page):
        assert "hidden-place" not in shown
        assert "REDACTED/rows.jsonl" in shown


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
