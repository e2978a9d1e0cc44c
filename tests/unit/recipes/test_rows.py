"""Row formats: every one read as people write it, and mistakes that name the place in the row."""

from __future__ import annotations

import json

import pytest

from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.formats import COLUMNS, READ_BY, detect_format, require_readable
from ftlaunch.recipes.rows import (
    READERS,
    BinaryPreference,
    Completion,
    Conversation,
    Preference,
    Ranking,
    Text,
    parse_row,
    written_out,
)

ASK = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


def test_chat_with_tools_and_calls_in_every_spelling():
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    plain = Conversation([ASK, called, result, ANSWER], [TOOL], [])
    assert parse_row({"messages": [ASK, called, result, ANSWER], "tools": [TOOL]}, "chat") == plain
    as_text = {"id": "c1", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    spelled = [ASK, {**called, "tool_calls": [as_text]}, result, ANSWER]
    assert parse_row({"messages": json.dumps(spelled), "tools": json.dumps([TOOL])}, "chat") == plain
    flat = [ASK, {**called, "tool_calls": json.dumps([{"id": "c1", "name": "add", "arguments": {"a": 2, "b": 2}}])}]
    assert parse_row({"messages": flat, "tools": [json.dumps(TOOL)]}, "chat").messages == [ASK, called]
    assert parse_row({"messages": flat, "tools": json.dumps(TOOL)}, "chat").tools == [TOOL]
    old = [
        ASK,
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
        {"role": "function", "name": "add", "content": "4"},
    ]
    read = parse_row({"messages": old}, "chat").messages
    assert read[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    assert "function_call" not in read[1]
    assert read[2] == {"role": "tool", "name": "add", "content": "4"}


def test_parts_of_text_are_joined_and_flags_are_kept():
    parts = [{"type": "text", "text": "2"}, {"type": "text", "text": "+2?"}]
    row = {"messages": [{"role": "user", "content": parts}, {**ANSWER, "weight": 0}], "tools": None}
    assert parse_row(row, "chat") == Conversation([ASK, {**ANSWER, "weight": 0}], [], [])


def test_sharegpt():
    calls = [{"name": "add", "arguments": {"a": 2, "b": 2}}]
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": json.dumps(calls[0])},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4", "weight": 1},
        ],
        "tools": json.dumps([TOOL]),
    }
    read = parse_row(row, "sharegpt")
    call = {"type": "function", "function": calls[0]}
    assert read.messages == [
        {"role": "system", "content": "Be brief."},
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {**ANSWER, "weight": 1},
    ]
    assert read.tools == [TOOL]
    assert parse_row({"conversations": [ASK, ANSWER]}, "sharegpt").messages == [ASK, ANSWER]


def test_alpaca():
    row = {"instruction": "Add.", "input": "2+2", "output": "4", "system": "Be brief.", "history": [["1+1", "2"]]}
    assert parse_row(row, "alpaca").messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Add.\n\n2+2"},
        ANSWER,
    ]
    assert parse_row({"instruction": "2+2?", "input": "", "output": "4"}, "alpaca").messages == [ASK, ANSWER]


def test_prompt_and_completion_as_text_and_as_messages():
    assert parse_row({"prompt": "2+2?", "completion": "4"}, "prompt_completion") == Completion("2+2?", "4", [])
    earlier = [ASK, WRONG, {"role": "user", "content": "Sure?"}]
    both = parse_row({"prompt": earlier, "completion": [ANSWER]}, "prompt_completion")
    assert both == Conversation([*earlier, ANSWER], [], [], context=3)
    mixed = parse_row({"prompt": [ASK], "completion": "4"}, "prompt_completion")
    assert mixed == Conversation([ASK, ANSWER], [], [], context=1)
    assert parse_row({"text": "a"}, "text") == Text("a")


def test_preferences():
    as_text = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    assert parse_row(as_text, "preference") == Preference("2+2?", "4", "5", [], [])
    wanted = Preference([ASK], [ANSWER], [WRONG], [], [])
    for prompt in ([ASK], "2+2?", None):
        whole = {"prompt": prompt, "chosen": [ASK, ANSWER], "rejected": [ASK, WRONG]}
        assert parse_row(whole, "preference") == wanted, "the prompt is what both begin with"
    for prompt in ([ASK], "2+2?"):
        assert parse_row({"prompt": prompt, "chosen": [ANSWER], "rejected": [WRONG]}, "preference") == wanted
    assert parse_row({"prompt": [ASK], "chosen": "4", "rejected": "5"}, "preference") == wanted


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1"])
def test_binary_preferences(label):
    row = {"prompt": "2+2?", "completion": "4", "label": label}
    assert parse_row(row, "binary_preference") == BinaryPreference("2+2?", "4", True, [], [])


def test_rankings():
    row = {"prompt": "2+2?", "responses": ["4", "5", "22"]}
    assert parse_row(row, "ranking").scores == [0.0, -1.0, -2.0], "the best comes first"
    assert parse_row(row | {"scores": [9, 1.5, 0]}, "ranking").scores == [9.0, 1.5, 0.0]
    assert parse_row(row | {"ranks": [1, 3, 2]}, "ranking").scores == [-1.0, -3.0, -2.0]
    messages = parse_row({"prompt": "2+2?", "responses": [[ANSWER], [WRONG]]}, "ranking")
    assert messages == Ranking([ASK], [[ANSWER], [WRONG]], [0.0, -1.0], [], [])


def test_documents_as_text_and_as_objects():
    titled = {"title": "Sums", "text": "2+2=4"}
    for given in (titled, [titled], ["2+2=4"], "2+2=4"):
        read = parse_row({"prompt": "2+2?", "completion": "4", "documents": given}, "prompt_completion").documents
        assert read == ([titled] if given in (titled, [titled]) else [{"text": "2+2=4"}])
    assert written_out([titled, {"contents": "b"}]) == "[1] Sums\n2+2=4\n\n[2]\nb"


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
MALFORMED = [
    ("chat", {"messages": "hello"}, r"messages is text that is not JSON"),
    ("chat", {"messages": 3}, r"messages is int 3; expected a list of \{role, content\}"),
    ("chat", {"messages": [ASK, "hi"]}, r"messages\[1\] is str 'hi'; expected \{role, content\}"),
    ("chat", {"messages": [{"from": "human", "value": "a"}]}, r"messages\[0\] is .* is format sharegpt"),
    (
        "chat",
        {"messages": [{"role": "human", "content": "a"}]},
        r"messages\[0\]\.role is 'human'; expected .*here user",
    ),
    ("chat", {"messages": [{"role": "User", "content": "a"}]}, r"messages\[0\]\.role is 'User'"),
    ("chat", {"messages": [{"role": "user", "content": [IMAGE]}]}, r"content\[0\] is of type image_url; only text"),
    ("chat", {"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content is int 3; expected text"),
    ("chat", {"messages": [{**ANSWER, "tool_calls": [{"id": "x"}]}]}, r"tool_calls\[0\] is dict .*expected \{function"),
    (
        "chat",
        {"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": "a=1"}]}]},
        r"messages\[0\]\.tool_calls\[0\]\.function\.arguments is text that is not JSON",
    ),
    ("chat", {"messages": [ASK], "tools": 3}, r"tools is int 3"),
    ("chat", {"messages": [ASK], "documents": [3]}, r"documents\[0\] is int 3; expected text"),
    ("sharegpt", {"conversations": [{"from": "narrator", "value": "a"}]}, r"conversations\[0\]\.from is 'narrator'"),
    ("sharegpt", {"conversations": [{"text": "a"}]}, r"conversations\[0\] is dict .*expected \{from, value\}"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "f()"}]}, r"conversations\[0\]\.value is text"),
    ("alpaca", {"instruction": 3, "output": ""}, r"instruction is int 3; expected text"),
    ("alpaca", {"instruction": "", "output": "", "history": ["a"]}, r"history\[0\] is str 'a'; expected \[question"),
    ("prompt_completion", {"prompt": 1, "completion": ""}, r"prompt is int 1"),
    ("text", {"text": ["a"]}, r"text is list \['a'\]; expected text"),
    ("preference", {"chosen": "a", "rejected": "b"}, "no prompt"),
    ("preference", {"chosen": [ASK, ANSWER], "rejected": [ASK]}, "rejected holds nothing beyond the prompt"),
    ("binary_preference", {"prompt": "a", "completion": "b", "label": "good"}, "label is str 'good'; expected true"),
    ("binary_preference", {"prompt": "a", "completion": "b", "label": None}, "label is NoneType None"),
    ("ranking", {"prompt": "a", "responses": ["b"]}, "responses holds 1; expected two"),
    ("ranking", {"prompt": "a", "responses": ["b", "c"], "scores": [1]}, r"scores is list \[1\]; expected 2 numbers"),
    ("ranking", {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2], "ranks": [1, 2]}, "both scores and ranks"),
]


@pytest.mark.parametrize(("row_format", "row", "says"), MALFORMED)
def test_a_malformed_row_says_where_what_and_what_is_expected(row_format, row, says):
    with pytest.raises(ValueError, match=says):
        parse_row(row, row_format)


def test_formats_are_found_when_only_one_fits():
    assert set(COLUMNS) == set(READERS)
    for row_format, columns in COLUMNS.items():
        if row_format != "binary_preference":
            assert detect_format([*columns.required, "id"]) == row_format
    with pytest.raises(UserError, match=r"fit prompt_completion and binary_preference\. Say which with `format:`"):
        detect_format(["prompt", "completion", "label"])
    with pytest.raises(UserError, match="fit chat and preference"):
        detect_format(["prompt", "chosen", "rejected", "messages"])


def test_formats_that_a_method_does_not_read_are_refused_by_name():
    for method, formats in READ_BY.items():
        for row_format in COLUMNS:
            if row_format in formats:
                require_readable(row_format, method, "here")
            else:
                with pytest.raises(UserError, match=rf"here: its rows are in format {row_format}, and method {method}"):
                    require_readable(row_format, method, "here")
