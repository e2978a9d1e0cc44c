"""`ftlaunch check` on data in which faults were planted: it finds every one of them, and names the row."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import CHATML, chat_rows, make_tokenizer, text_rows, write_jsonl, write_parquet, write_recipe

from ftlaunch.launcher import cli
from ftlaunch.launcher.check_findings import KINDS

SEQUENCE_LENGTH = 256


class Fault(NamedTuple):
    """A row with something wrong, and the code it must be found under. `raw`: the line itself, if it is no row."""

    code: str
    row: Any = None
    raw: bytes = b""
    same_as: int | None = None
    """Row of the source that this one is a copy of."""


ENDLESS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ 'user:' + message['content'] }}{% endif %}{% endfor %}"
)
"""A template that closes no turn."""


def turns(*texts: str) -> dict[str, Any]:
    """A conversation, user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def by(*pairs: tuple[str, str]) -> dict[str, Any]:
    """A conversation with the roles given."""
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


GOOD = chat_rows(60, seed=3)
QUESTION = "which letter comes after alpha in the alphabet, and which before gamma?"
LONG = " ".join(f"{n}" for n in range(200))

CHAT: tuple[Fault, ...] = (
    Fault("unreadable-row", raw=b'{"messages": ['),
    Fault("unreadable-row", raw=b'{"messages": "caf\xe9"}'),
    Fault("unreadable-row", raw=b'["a list"]'),
    Fault("unreadable-row", {"text": "another kind of row"}),
    Fault("malformed-row", {"messages": "user: hello"}),
    Fault("malformed-row", by(("user", "hello"), ("assistant", 5))),  # type: ignore[arg-type]
    Fault("nothing-learned", {"messages": []}),
    Fault("nothing-learned", turns("say nothing", "  ")),
    Fault("blank-turn", turns("say nothing", "", "say beta", "beta")),
    Fault("ends-without-answer", turns("say alpha", "alpha", "say gamma")),
    Fault("repeated-role", by(("user", "say"), ("user", "delta"), ("assistant", "delta"))),
    Fault("overlong", turns("count", LONG)),
    Fault("prompt-fills-sequence", turns(f"read {LONG}", "done")),
    Fault("special-token-in-text", turns("what is <|im_end|> for", "it ends a turn")),
    Fault("template-marks", turns("[INST] say mu [/INST]", "mu")),
    Fault("doubled-bos", turns("<|endoftext|>say nu", "nu")),
    Fault("replacement-character", turns("a na\ufffdve question", "an answer")),
    Fault("wrong-encoding", turns("the cafÃ© is closed", "donâ€™t go")),
    Fault("control-character", turns("bell \x07 rings", "ding")),
    Fault("repetitive", turns("sing", "la " * 60)),
    Fault("secret", turns("deploy", "use AKIAABCDEFGHIJKLMNOP")),
    Fault("duplicate", GOOD[7], same_as=7),
    Fault("near-duplicate", turns("Say  ALPHA and beta, twice!", "Alpha beta alpha beta"), same_as=len(GOOD)),
    Fault("several-answers", turns(QUESTION, "gamma"), same_as=len(GOOD) + 1),
)
FIRST = [*GOOD, turns("say alpha and beta, twice", "alpha beta alpha beta"), turns(QUESTION, "beta")]

PAIRS: tuple[Fault, ...] = (
    Fault("missing-prompt", {"prompt": " ", "completion": "an answer to nothing"}),
    Fault("glued", {"prompt": "say alpha", "completion": "alpha"}),
    Fault("malformed-row", {"prompt": 5, "completion": "five"}),
)
GOOD_PAIRS = [
    {"prompt": f"{n} {row['text']}\n", "completion": row["text"]} for n, row in enumerate(text_rows(30, words=(3, 9)))
]

GOOD_TEXTS = [{"text": f"text {n} alpha beta gamma delta epsilon zeta eta theta iota kappa"} for n in range(40)]
TEXTS: tuple[Fault, ...] = (
    Fault("very-long", {"text": " ".join(f"number {n}" for n in range(900))}),
    Fault("very-short", {"text": "a"}),
    Fault("split", {"text": " ".join(f"figure {n}" for n in range(99))}),
)

SHARED: tuple[Fault, ...] = (
    Fault("repeated-role", {"conversations": [{"from": by, "value": by} for by in ("human", "gpt", "gpt")]}),
    Fault("ends-without-answer", {"conversations": [{"from": by, "value": "hm"} for by in ("human", "gpt", "human")]}),
    Fault("malformed-row", {"conversations": [{"from": "nobody", "value": "boo"}]}),
)
GOOD_SHARED = [
    {"conversations": [{"from": by, "value": f"{by} says {n}"} for by in ("human", "gpt")]} for n in range(9)
]

TOLD: tuple[Fault, ...] = (
    Fault("nothing-learned", {"instruction": "be silent", "input": "", "output": " "}),
    Fault("missing-prompt", {"instruction": "", "input": " ", "output": "an answer to nothing"}),
    Fault("malformed-row", {"instruction": ["a", "list"], "output": "no"}),
)
GOOD_TOLD = [{"instruction": f"add one to {n}", "input": "", "output": f"{n + 1}"} for n in range(9)]

CHOICES: tuple[Fault, ...] = (
    Fault("unreadable-row", raw=b'{"prompt": "a or b?", "chosen"'),
    Fault("unreadable-row", {"prompt": "a or b?", "chosen": "a"}),
    Fault("malformed-row", {"prompt": "a or b?", "chosen": ["a"], "rejected": "b"}),
    Fault("malformed-row", {"prompt": "a or b?", "chosen": "", "rejected": "b"}),
    Fault("malformed-row", {"prompt": None, "chosen": "a", "rejected": "b"}),
    Fault("equal-answers", {"prompt": "a or b?", "chosen": "b", "rejected": "b"}),
    Fault("empty-answer", {"prompt": "one or two?", "chosen": "one", "rejected": " "}),
    Fault("missing-prompt", {"prompt": " ", "chosen": "answered", "rejected": "refused"}),
    Fault("wrong-encoding", {"prompt": "the cafÃ© is?", "chosen": "closed", "rejected": "open"}),
    Fault("secret", {"prompt": "deploy", "chosen": "no", "rejected": "AKIAABCDEFGHIJKLMNOP"}),
    Fault("duplicate", {"prompt": "2 or 3?", "chosen": "3", "rejected": "2"}),
)
GOOD_CHOICES = [{"prompt": f"{n} or {n + 1}?", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(9)]

JUDGED: tuple[Fault, ...] = (
    Fault("malformed-row", {"prompt": "is it?", "completion": "it is", "label": "perhaps"}),
    Fault("empty-answer", {"prompt": "is it not?", "completion": " ", "label": False}),
    Fault("missing-prompt", {"prompt": "", "completion": "it is so", "label": True}),
    Fault("near-duplicate", {"prompt": "Is 3 odd", "completion": "YES, 3.", "label": 1}),
    Fault("control-character", {"prompt": "ring", "completion": "bell \x07", "label": True}),
)
GOOD_JUDGED = [{"prompt": f"is {n} odd?", "completion": f"yes, {n}", "label": n % 2} for n in range(9)]

RANKED: tuple[Fault, ...] = (
    Fault("malformed-row", {"prompt": "best?", "responses": ["only one"]}),
    Fault("malformed-row", {"prompt": "best?", "responses": ["one", "two"], "scores": [1.0]}),
    Fault("equal-scores", {"prompt": "which?", "responses": ["this", "that", "none"], "scores": [2, 2, 2]}),
    Fault("equal-answers", {"prompt": "which one?", "responses": ["this", "that", "this"], "scores": [1, 2, 3]}),
    Fault("empty-answer", {"prompt": "which of them?", "responses": ["this", ""], "scores": [1, 2]}),
    Fault("missing-prompt", {"prompt": "\n", "responses": ["either", "neither"], "scores": [1, 2]}),
    Fault("replacement-character", {"prompt": "lost?", "responses": ["a \ufffd", "a sign"], "scores": [1, 2]}),
)
GOOD_RANKED = [{"prompt": f"rank {n}", "responses": [f"{n}", f"{n}{n}"], "scores": [n, n + 1]} for n in range(9)]

ROWS = (
    ("chat", FIRST, CHAT),
    ("pairs", GOOD_PAIRS, PAIRS),
    ("texts", GOOD_TEXTS, TEXTS),
    ("shared", GOOD_SHARED, SHARED),
    ("told", GOOD_TOLD, TOLD),
    ("choices", GOOD_CHOICES, CHOICES),
    ("judged", GOOD_JUDGED, JUDGED),
    ("ranked", GOOD_RANKED, RANKED),
)
"""(source, its good rows, the faulty ones behind them)."""

SOURCES = (
    ("unreadable-file", "letters"),  # one of its two files is cut off
    ("empty-column", "blank"),
    ("same-answer", "labels"),
    ("few-supervised", "essays"),
    ("duplicate-across-sources", "essays"),
    ("leaked", "held-out"),
    ("leaked-prompt", "held-out"),
    ("small-eval", "held-out"),
    ("teaches-nothing", "silent"),
    ("unreadable-source", "gone"),
    ("unreadable-source", "odd"),  # its second file lacks the column
    ("unreadable-source", "choices"),  # in a format that the method does not learn from
    ("unreadable-source", "judged"),
    ("unreadable-source", "ranked"),
    ("unreadable-source", "praised"),
    ("one-label", "praised"),
)  # fmt: skip
"""Faults that are of a source, or are found by comparing sources."""


def write_lines(path: Path, good: list[dict[str, Any]], faults: tuple[Fault, ...]) -> None:
    lines = [json.dumps(row).encode() for row in good] + [
        fault.raw or json.dumps(fault.row).encode() for fault in faults
    ]
    path.write_bytes(b"\n".join(lines))


def write_model(folder: Path) -> None:
    """ChatML that begins with a begin-of-sequence token."""
    make_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<|endoftext|>", "chat_template": "{{ bos_token }}" + CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_data(folder: Path) -> None:
    """All the sources, each with its faults behind its good rows."""
    for name, good, faults in ROWS:
        write_lines(folder / f"{name}.jsonl", good, faults)
    write_jsonl(
        folder / "praised.jsonl", [{**row, "completion": f"{n}!", "label": 1} for n, row in enumerate(GOOD_JUDGED)]
    )
    (folder / "letters").mkdir()
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in text_rows(9, seed=5)))
    (folder / "letters" / "1.jsonl.gz").write_bytes(whole)
    (folder / "letters" / "2.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    write_parquet(folder / "blank.parquet", [{"prompt": "", "completion": f"answer {n}"} for n in range(9)])
    write_jsonl(folder / "labels.jsonl", [turns(f"letter {n} or figure?", "figure") for n in range(30)])
    essays = [{"prompt": f"{n} " + "alpha beta gamma " * 20, "completion": "a"} for n in range(9)]
    write_jsonl(folder / "essays.jsonl", [*essays, GOOD_PAIRS[4]])
    write_jsonl(folder / "held-out.jsonl", [GOOD[9], turns(QUESTION, "no idea"), *chat_rows(5, seed=11)])
    write_jsonl(folder / "silent.jsonl", [turns("anybody there?", " ")] * 3)
    (folder / "odd").mkdir()
    write_parquet(folder / "odd" / "1.parquet", [{"text": "alpha"}])
    write_parquet(folder / "odd" / "2.parquet", [{"body": "alpha"}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_model(folder / "model")
    write_data(folder)
    train = [
        {"path": "chat.jsonl", "format": "chat"},
        {"path": "pairs.jsonl"},
        {"path": "shared.jsonl"},
        {"path": "told.jsonl"},
        {"path": "texts.jsonl"},
        {"path": "letters", "format": "text"},
        {"path": "blank.parquet"},
        {"path": "labels.jsonl"},
        {"path": "essays.jsonl"},
    ]
    names = ("held-out.jsonl", "silent.jsonl", "gone.jsonl", "odd", "choices.jsonl", "ranked.jsonl")
    evaluated = [{"path": path} for path in names]
    # Their columns are those of a prompt and its completion, too.
    evaluated += [{"path": path, "format": "binary_preference"} for path in ("judged.jsonl", "praised.jsonl")]
    for source in [*train, *evaluated]:
        source["path"] = str(folder / source["path"])
    recipe = {
        "name": "faulty",
        "model": {"path": str(folder / "model")},
        "data": {"sequence_length": SEQUENCE_LENGTH, "train": train, "eval": evaluated},
        "checkpoint": {"path": str(folder / "runs")},
    }
    write_recipe(folder / "recipe.yaml", recipe)
    return folder


def check(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["check", str(folder / "recipe.yaml"), "--json", *words])
    assert "Traceback" not in err.getvalue()
    return code, json.loads(out.getvalue())


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    code, result = check(folder)
    assert code == 1
    return result


def named(found: dict[str, Any], code: str, source: str) -> set[str]:
    """Rows named under a code."""
    findings = [each for each in found["findings"] if (each["code"], each["where"]) == (code, source)]
    return {row["row"].rpartition("row ")[2] for each in findings for row in each["rows"]}


def test_every_planted_row_is_found(found):
    planted = [
        (fault.code, source, len(good) + number) for source, good, faults in ROWS for number, fault in enumerate(faults)
    ]
    assert [each for each in planted if str(each[2]) not in named(found, *each[:2])] == []


def test_every_planted_fault_of_a_source_is_found(found):
    there = {(each["code"], each["where"]) for each in found["findings"]}
    assert [fault for fault in SOURCES if fault not in there] == []


def test_good_rows_are_accused_of_nothing(found):
    """But for those that a planted row was copied from, whose copies come later."""
    for source, good, _ in ROWS:
        findings = [each for each in found["findings"] if each["where"] == source]
        rows = {int(row["row"].rpartition("row ")[2]) for each in findings for row in each["rows"]}
        assert [row for row in rows if row < len(good)] == []


def test_rows_that_the_method_does_not_learn_from_are_read_and_their_source_is_one_error(found):
    read_only = {"choices", "judged", "ranked", "praised"}
    of_source = [each for each in found["findings"] if each["where"] in read_only and not each["rows"]]
    expected = {("unreadable-source", name) for name in read_only} | {("one-label", "praised")}
    assert sorted((each["code"], each["where"]) for each in of_source) == sorted(expected)
    assert all("method sft reads chat" in each["what"] for each in of_source if each["code"] == "unreadable-source")
    sources = {source["name"]: source for source in found["sources"]}
    for name in read_only:
        assert (sources[name]["complete"], sources[name]["samples"], sources[name]["tokens"]) == (True, 0, 0)
    assert sources["choices"]["rows_looked_at"] == len(GOOD_CHOICES) + len(CHOICES)


def test_a_method_that_learns_from_texts_only_has_all_other_rows_read(folder, found):
    seen = check(folder, "method={type: cpt}")[1]
    refused = {each["where"] for each in seen["findings"] if each["code"] == "unreadable-source"}
    assert refused >= {"chat", "pairs", "shared", "told", "choices"}
    assert "texts" not in refused
    for source in ("chat", "pairs", "shared", "told"):
        for code in ("unreadable-row", "malformed-row", "repeated-role", "missing-prompt", "glued", "duplicate"):
            assert named(seen, code, source) == named(found, code, source)


def test_copies_name_their_originals(found):
    for n, fault in enumerate(CHAT):
        if fault.same_as is not None:
            rows = next(f["rows"] for f in found["findings"] if (f["code"], f["where"]) == (fault.code, "chat"))
            mine = next(row for row in rows if row["row"].endswith(f"row {len(FIRST) + n}"))
            assert mine["detail"].endswith(f"row {fault.same_as}")


def test_a_secret_is_not_quoted(found):
    assert "AKIAABCDEFGHIJKLMNOP" not in json.dumps(found["findings"])


def test_lines_are_named_by_their_number(found):
    details = [row["detail"] for f in found["findings"] if f["code"] == "unreadable-row" for row in f["rows"]]
    assert details[0].startswith(f"line {len(FIRST) + 1}: not valid JSON")
    assert details[1].startswith(f"line {len(FIRST) + 2}: not valid UTF-8")


def test_findings_come_worst_first_and_say_what_to_do(found):
    severities = [finding["severity"] for finding in found["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "advice"].index)
    assert all(finding["remedy"] == KINDS[finding["code"]].remedy for finding in found["findings"])
    assert found["counts"] == {each: severities.count(each) for each in ("error", "warning", "advice")}


def test_a_small_sample_says_so_and_the_seed_chooses(folder):
    first = check(folder, "--rows", "20")[1]["sources"][0]
    assert (first["rows_looked_at"], first["complete"]) == (20, False)
    rows = len(FIRST) + len(CHAT)
    assert rows / 2 < first["rows_estimated"] < rows * 2
    again = check(folder, "--rows", "20")[1]["sources"][0]
    other = check(folder, "--rows", "20", "--seed", "1")[1]["sources"][0]
    assert first == again != other


def test_all_rows_are_looked_at_when_asked(folder, found):
    whole = check(folder, "--rows", "all")[1]
    assert all(source["complete"] for source in whole["sources"])
    sums = [{(f["code"], f["where"]): f["count"] for f in result["findings"]} for result in (whole, found)]
    assert sums[0] == sums[1]


def test_what_is_cut_is_counted_with_what_it_loses(folder):
    found = check(folder, "data.overlong=truncate_right")[1]
    cut = next(each for each in found["findings"] if each["code"] == "truncated")
    assert (cut["where"], cut["count"]) == ("chat", 1)
    assert "supervised ones cut off" in cut["rows"][0]["detail"]
    refused = check(folder, "data.overlong=error")[1]
    assert len(named(refused, "overlong-refused", "chat")) == 2


def test_a_template_that_never_ends_is_found(folder):
    (folder / "endless.jinja").write_text(ENDLESS)
    found = check(folder, f"model.chat_template={folder / 'endless.jinja'}")[1]
    assert ("end-not-learned", "labels") in {(each["code"], each["where"]) for each in found["findings"]}
