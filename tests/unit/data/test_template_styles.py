"""Masks of published chat-template styles, token by token, and against transformers.

The golden files (`golden/STYLE.txt`: a token a line, `+` where it is learned) are written by
`python tests/support/chat_styles.py` and read by a person before they are committed. Learned are the assistant's words
and the token that ends its turn; not the header, nor blanks that the template writes behind that token.
"""

from __future__ import annotations

import difflib

import pytest
from chat_styles import CONVERSATIONS, DATA, NOW, STYLES, golden, save, say, tools_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ftlaunch.distributed.data.template import load_tokenizer

PIECES = [
    *("a", "b c", " ", "\n", "  ", "\n\n", "naïve", "🙂", "你好", "<b>", "[x]", "{}", "</", "|>", "it"),
    *("<|im_end|>", "</s>", "<s>", "[INST]", "<think>", "</think>", "user", "assistant"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


class Twin:
    """A style's tokenizer here and in transformers, with and without `{% generation %}` blocks."""

    def __init__(self, name, folder):
        marked, plain = save(name, folder / "marked", plain=False), save(name, folder / "plain")
        self.ours_marked, self.ours = load_tokenizer(marked, now=NOW), load_tokenizer(plain, now=NOW)
        self.theirs_marked, self.theirs = AutoTokenizer.from_pretrained(marked), AutoTokenizer.from_pretrained(plain)

    def check(self, messages, tools=None):
        """Ids and masks are those of transformers, whether the template has blocks or not."""
        said = self.theirs_marked.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert self.theirs.apply_chat_template(messages, tools=tools, return_dict=False) == said["input_ids"]
        for encoder in (self.ours_marked, self.ours):
            ids, mask = encoder.chat(messages, tools, "assistant")
            assert ids.tolist() == said["input_ids"]
            assert mask.astype(int).tolist() == said["assistant_masks"]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return {name: Twin(name, tmp_path_factory.mktemp(name)) for name in STYLES}


@pytest.mark.parametrize("name", STYLES)
def test_masks_are_those_that_were_read_and_approved(name, tmp_path):
    expected, found = (DATA / "golden" / f"{name}.txt").read_text(), golden(name, tmp_path)
    difference = "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), "approved", "now", n=8))
    assert found == expected, f"{difference}\nIf that is right: python tests/support/chat_styles.py"


@pytest.mark.parametrize("name", STYLES)
def test_ids_and_masks_are_those_of_transformers(twins, name):
    known = [conversation for conversation in STYLES[name].knows if (name, conversation) != ("gemma", "turns")]
    for conversation in known:
        twins[name].check(CONVERSATIONS[conversation], tools_of(conversation))


@pytest.mark.parametrize("name", STYLES)
def test_random_conversations_have_the_masks_of_transformers(twins, name):
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(TURNS, st.none() | TEXTS)
    @example([("", "\n\n\n"), ("", "")], None)
    def check(turns, system):
        pairs = [message for asked, said in turns for message in (say("user", asked), say("assistant", said))]
        if name == "deepseek-r1":  # its prompt has written <think> already, so no answer begins with it
            pairs = [{**message, "content": message["content"].replace("<think>", "")} for message in pairs]
        lead = [say("system", system)] if system is not None and name != "gemma" else []
        twins[name].check([*lead, *pairs])

    check()
