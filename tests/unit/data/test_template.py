"""Chat templates and masks, against transformers and token by token. Templates follow the published formats."""

from __future__ import annotations

import json
from datetime import datetime

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftlaunch.distributed.data.template import load_tokenizer
from ftlaunch.recipes.errors import UserError

SPECIAL = [
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
]  # fmt: skip

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
GENERATION = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3, "generation": GENERATION}

TALK = [
    {"role": "user", "content": "Wie heißt du? 你好"},
    {"role": "assistant", "content": "I am a  model — naïve 🙂."},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def vocabulary():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (
        [message["content"] for message in TALK] + [TEMPLATES[name] for name in TEMPLATES] + ["a model is a model"] * 9
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer.to_str()


@pytest.fixture
def folder(tmp_path, vocabulary):
    """A function that saves a tokenizer as transformers does, and returns its folder."""

    def save(template=None, adds_bos=False, trim=False):
        tokenizer = Tokenizer.from_str(vocabulary)
        steps = [processors.ByteLevel(trim_offsets=trim)]
        if adds_bos:
            steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
        tokenizer.post_processor = processors.Sequence(steps)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        fast.chat_template = template
        fast.save_pretrained(tmp_path / "tokenizer")
        return str(tmp_path / "tokenizer")

    return save


def supervised(encoder, ids, mask):
    """The supervised text, turn by turn."""
    turns, inside = [], False
    for token, marked in zip(ids.tolist(), mask.tolist(), strict=True):
        if marked:
            turns = turns if inside else [*turns, []]
            turns[-1].append(token)
        inside = marked
    return [encoder.decode(turn) for turn in turns]


EXPECTED = {
    "chatml": ["I am a  model — naïve 🙂.<|im_end|>", "4<|im_end|>"],
    "llama3": ["I am a  model — naïve 🙂.<|eot_id|>", "4<|eot_id|>"],
    "mistral": [" I am a  model — naïve 🙂.</s>", " 4</s>"],
    "qwen3": ["I am a  model — naïve 🙂.<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"],
    "generation": ["I am a  model — naïve 🙂.<|im_end|>", "4<|im_end|>"],
}


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_and_masks_cover_every_turn(folder, name, trim):
    path = folder(TEMPLATES[name], adds_bos=True, trim=trim)
    encoder, oracle = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    talks = [TALK, TALK[:2]] + ([[SYSTEM, *TALK]] if name != "mistral" else [])
    for talk in talks:
        ids, mask = encoder.chat(talk, None, "assistant")
        assert ids.tolist() == oracle.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert ids.dtype == np.int32
    ids, mask = encoder.chat(TALK, None, "assistant")
    assert supervised(encoder, ids, mask) == EXPECTED[name]
    assert supervised(encoder, *encoder.chat(TALK, None, "last_assistant")) == EXPECTED[name][-1:]
    assert encoder.chat(TALK, None, "all")[1].all()
    assert ids.tolist().count(encoder.bos_token_id) == (0 if name in ("chatml", "qwen3") else 1)


def test_generation_blocks_give_the_mask_of_transformers(folder):
    path = folder(GENERATION)
    ids, mask = load_tokenizer(path).chat(TALK, None, "assistant")
    oracle = AutoTokenizer.from_pretrained(path).apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert mask.astype(int).tolist() == oracle["assistant_masks"]
    assert ids.tolist() == oracle["input_ids"]


def test_masks_token_by_token(folder):
    encoder = load_tokenizer(folder(CHATML))
    ids, mask = encoder.chat(TALK[2:], None, "assistant")
    shown = [(encoder.decode([token]), bool(marked)) for token, marked in zip(ids, mask, strict=True)]
    assert shown[-6:] == [
        ("<|im_start|>", False), *shown[-5:-3], *[("4", True), ("<|im_end|>", True), ("\n", False)],
    ][-6:]  # fmt: skip
    assert [text for text, marked in shown if marked] == ["4", "<|im_end|>"]


def test_tools_and_thinking_of_earlier_turns(folder):
    """Qwen3 drops the thinking of turns before the last question; the mask follows what is really rendered."""
    encoder = load_tokenizer(path := folder(QWEN3))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    talk = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "<think>\nhidden\n</think>\n\nopen"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "<think>\nuse it\n</think>\n\n", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "<think>\nseen\n</think>\n\nfour"},
        {"role": "user", "content": "third"},
        {"role": "assistant", "content": "<think>\nlast\n</think>\n\nend"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    ids, mask = encoder.chat(talk, tools, "assistant")
    oracle = AutoTokenizer.from_pretrained(path)
    assert ids.tolist() == oracle.apply_chat_template(talk, tools=tools, tokenize=True, return_dict=False)
    assert supervised(encoder, ids, mask) == [
        "open<|im_end|>",
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        "four<|im_end|>",
        "<think>\nlast\n</think>\n\nend<|im_end|>",
    ]


def test_a_prompt_that_opens_a_thinking_block(folder):
    template = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    encoder = load_tokenizer(folder(template))
    assert supervised(encoder, *encoder.chat(TALK, None, "assistant")) == EXPECTED["chatml"]


def test_a_template_that_is_not_prefix_preserving_is_refused_with_the_difference(folder):
    template = "{{ messages | length }} {% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    encoder = load_tokenizer(folder(template))
    with pytest.raises(UserError, match=r"beginning otherwise.*'4 user.*'") as caught:
        encoder.chat(TALK, None, "assistant")
    assert "{% generation %}" in str(caught.value)
    assert encoder.chat(TALK, None, "all")[1].all()


def test_what_the_template_refuses_is_a_value_error(folder):
    encoder = load_tokenizer(folder(MISTRAL))
    with pytest.raises(ValueError, match=r"refuses the conversation \(user, user\).*must alternate"):
        encoder.chat([TALK[0], TALK[2]], None, "assistant")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_begin_and_end_of_sequence_are_there_exactly_once(folder, adds_bos):
    encoder = load_tokenizer(folder(adds_bos=adds_bos))
    bos, eos = encoder.bos_token_id, encoder.eos_token_id
    for text in ("a model", "<s>a model", "a model</s>", "<s>a model</s></s>", ""):
        ids, mask = encoder.text(text)
        assert ids.tolist().count(eos) == 1
        assert ids[-1] == eos
        assert ids.tolist().count(bos) == int(adds_bos or text.startswith("<s>"))
        assert mask.all()


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("trim", [False, True])
def test_a_completion_is_supervised_from_its_first_token(folder, adds_bos, trim):
    encoder = load_tokenizer(folder(adds_bos=adds_bos, trim=trim))
    for prompt, completion in [("a model is:", " naïve 🙂"), ("a", " model"), ("", "all of it"), ("你", "好\n")]:
        ids, mask = encoder.prompt_completion(prompt, completion)
        whole = encoder.text(prompt + completion)[0]
        assert ids.tolist() == whole.tolist()
        assert supervised(encoder, ids, mask) == [completion + "</s>"]
    ids, mask = encoder.prompt_completion("a mo", "del")
    assert supervised(encoder, ids, mask)[0].endswith("del</s>")


def test_a_token_across_the_boundary_belongs_to_the_completion(folder):
    encoder = load_tokenizer(folder())
    whole = encoder.text(" model")[0]
    assert len(whole) == 2, "' model' is one token of the test's vocabulary"
    _, mask = encoder.prompt_completion(" mo", "del")
    assert mask.tolist() == [True, True]


def test_tools_dates_and_files_beside_the_tokenizer(folder, tmp_path):
    path = folder("{{ strftime_now('%d %b %Y') }}{{ tools | tojson if tools else '' }}")
    encoder = load_tokenizer(path, now=datetime(2024, 7, 26))
    assert encoder.chat_template.render(TALK, [{"a": "<b>"}]) == '26 Jul 2024[{"a": "<b>"}]'
    assert load_tokenizer(path, None, "{{ eos_token }}x").chat_template.render(TALK, None) == "</s>x"


def test_the_end_token_may_be_known_to_the_generation_config_only(folder, tmp_path):
    path = folder()
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(path).text("a")
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [4, 1]}')
    assert load_tokenizer(path).eos_token_id == 4


def test_mistakes_are_named(folder, tmp_path):
    path = folder()
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(path).chat(TALK, None, "assistant")
    with pytest.raises(UserError, match=r"chat template of .*, line 1"):
        load_tokenizer(path, None, "{% for %}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(str(tmp_path / "empty"))


def test_texts_prepared_at_once_are_the_same(folder):
    encoder, alone = load_tokenizer(folder()), load_tokenizer(folder())
    texts = ["a model", "", "a model", "</s>", "dies", "x</s></s>"]
    encoder.prepare(texts)
    for text in [*texts, "never prepared"]:
        for found, expected in zip(encoder.text(text), alone.text(text), strict=True):
            assert found.tolist() == expected.tolist()
            assert found.dtype == expected.dtype


def test_half_a_character_is_refused_where_it_is_asked_for(folder):
    encoder = load_tokenizer(folder())
    encoder.prepare(["fine", "half \ud800"])
    assert len(encoder.text("fine")[0]) > 1
    with pytest.raises(ValueError, match="lone surrogate"):
        encoder.text("half \ud800")
