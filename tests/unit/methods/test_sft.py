"""What sft learns from a row of each format, through a real tokenizer and chat template."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from tiny import make_tokenizer

from ftlaunch.distributed.data.template import load_tokenizer
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.base import Rejected, Sample
from ftlaunch.recipes.methods.table import build_method
from ftlaunch.recipes.schema import Cpt, Sft

ASK, ANSWER = {"role": "user", "content": "alpha?"}, {"role": "assistant", "content": "beta"}
AGAIN, LATER = {"role": "user", "content": "gamma?"}, {"role": "assistant", "content": "delta"}
WITH_DOCUMENTS = (
    "{% for d in documents or [] %}<doc>{{ d.title }}:{{ d.text }}</doc>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=400))


@pytest.fixture(scope="module")
def chatml(folder):
    return load_tokenizer(folder)


def learned(encoder, row, row_format, train_on="assistant"):
    """(all text, the supervised pieces)."""
    sample = build_method(Sft(train_on=train_on)).encode(row, row_format, encoder)
    assert isinstance(sample, Sample), sample
    ids, mask = sample.input_ids, sample.supervised
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    pieces = [encoder.decode(ids[a:b]) for a, b in pairwise(cuts) if mask[a]]
    return encoder.decode(ids), pieces


def test_of_a_completion_in_messages_only_the_completion_is_learned(chatml):
    row = {"prompt": [ASK, ANSWER, AGAIN], "completion": [LATER]}
    text, pieces = learned(chatml, row, "prompt_completion")
    assert pieces == ["delta<|im_end|>"]
    assert "beta" in text
    assert learned(chatml, {"messages": [ASK, ANSWER, AGAIN, LATER]}, "chat")[1] == [
        "beta<|im_end|>",
        "delta<|im_end|>",
    ]
    assert learned(chatml, row, "prompt_completion", "all")[1] == [text]


def test_sharegpt_and_alpaca_are_learned_as_the_chats_they_are(chatml):
    chat = learned(chatml, {"messages": [ASK, ANSWER]}, "chat")
    turns = [{"from": "human", "value": "alpha?"}, {"from": "gpt", "value": "beta"}]
    assert learned(chatml, {"conversations": turns}, "sharegpt") == chat
    assert learned(chatml, {"instruction": "alpha?", "output": "beta"}, "alpaca") == chat


def test_documents_stand_in_front_of_the_first_question(chatml):
    documents = [{"title": "T", "text": "zeta"}, "eta"]
    row = {"messages": [ASK, ANSWER, AGAIN, LATER], "documents": documents}
    text, pieces = learned(chatml, row, "chat")
    assert text.startswith("<|im_start|>user\n[1] T\nzeta\n\n[2]\neta\n\nalpha?<|im_end|>")
    assert "gamma?" in text
    assert pieces == ["beta<|im_end|>", "delta<|im_end|>"]
    plain = {"prompt": "alpha?", "completion": " beta", "documents": "zeta"}
    assert learned(chatml, plain, "prompt_completion") == ("[1]\nzeta\n\nalpha? beta<|im_end|>", [" beta<|im_end|>"])
    with pytest.raises(ValueError, match="documents, and no message of the user"):
        learned(chatml, {"messages": [ANSWER], "documents": documents}, "chat")


def test_a_template_with_a_place_for_documents_gets_them(folder):
    encoder = load_tokenizer(folder, None, WITH_DOCUMENTS)
    row = {"messages": [ASK, ANSWER], "documents": {"title": "T", "text": "zeta"}}
    assert learned(encoder, row, "chat") == ("<doc>T:zeta</doc>[user]alpha?[assistant]beta", ["beta"])


@pytest.mark.parametrize(
    ("row", "row_format", "reason"),
    [
        ({"messages": []}, "chat", "empty conversation"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt", "empty answer"),
        ({"instruction": "a", "output": " "}, "alpaca", "empty answer"),
        ({"prompt": "a", "completion": " "}, "prompt_completion", "empty answer"),
        ({"prompt": [ASK, ANSWER, AGAIN], "completion": []}, "prompt_completion", "empty answer"),
        ({"text": "\n"}, "text", "empty text"),
    ],
)
def test_rows_that_teach_nothing_are_rejected_by_reason(chatml, row, row_format, reason):
    encoded = build_method(Sft()).encode(row, row_format, chatml)
    assert isinstance(encoded, Rejected)
    assert encoded.reason.startswith(reason)


@pytest.mark.parametrize("row_format", ["preference", "binary_preference", "ranking"])
def test_rows_for_other_methods_are_refused(chatml, row_format):
    with pytest.raises(UserError, match=f"format {row_format}, and method sft reads chat, sharegpt"):
        build_method(Sft()).encode({}, row_format, chatml)


def test_cpt_reads_text_alone(chatml):
    sample = build_method(Cpt()).encode({"text": "alpha beta"}, "text", chatml)
    assert isinstance(sample, Sample)
    assert sample.supervised.all()
    with pytest.raises(UserError, match="method cpt reads text"):
        build_method(Cpt()).encode({"messages": [ASK, ANSWER]}, "chat", chatml)
