"""Which turns are learned, and what templates do to turns that follow one another."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import trl
from chat_styles import CALL, CONVERSATIONS, NOW, STYLES, TOOLS, save, say, source
from transformers import AutoTokenizer

from ftlaunch.distributed.data.chat import ChatTemplate, with_defaults
from ftlaunch.distributed.data.spans import Conversation
from ftlaunch.distributed.data.template import load_tokenizer
from ftlaunch.distributed.model_files import ModelFolder
from ftlaunch.distributed.published import published_template
from ftlaunch.distributed.row_encoder import open_encoder, spec_of
from ftlaunch.launcher.sampling import make_encoder
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.methods.sft import Sft
from ftlaunch.recipes.methods.turns import choose_turns
from ftlaunch.recipes.schema import Recipe
from ftlaunch.recipes.schema import Sft as SftConfig

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
"""Templates as models ship them, which TRL carries along."""

TALK = [say("user", "a"), say("assistant", "one"), say("user", "b"), say("assistant", "two")]
CHAIN = [
    *TALK[:3],
    say("assistant", "", tool_calls=[CALL]),
    say("tool", "4"),
    say("assistant", "<think>\nr\n</think>\n\nfour"),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {name: save(name, tmp_path_factory.mktemp(name)) for name in ("chatml", "qwen3", "llama3")}


def learned(encoder, messages, train_on="assistant", tools=None):
    """The supervised texts, turn by turn."""
    ids, mask = encoder.chat(messages, tools, train_on)
    runs = "".join("x" if marked else " " for marked in mask).split(" ")
    ends = [at for at in range(len(mask)) if mask[at] and not (at + 1 < len(mask) and mask[at + 1])]
    lengths = [len(run) for run in runs if run]
    return [encoder.decode(ids[end + 1 - n : end + 1]) for end, n in zip(ends, lengths, strict=True)]


def turns_in(template, messages, tools=None):
    """What the assistant wrote, as text."""
    talk = Conversation(template, messages, tools)
    numbers = choose_turns(messages, "assistant").learned
    return [talk.text[slice(*span)] for span in talk.spans(numbers)]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["one<|im_end|>", '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>']),
        ("completion", ['<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>']),
        ("last_assistant", []),
    ],
)
def test_train_on_chooses_turns(tokenizers, train_on, expected):
    """`completion` is everything after the last question: a chain of calls, and the thinking that Qwen3 keeps there."""
    answer = "<think>\nr\n</think>\n\nfour<|im_end|>"
    assert learned(load_tokenizer(tokenizers["qwen3"]), CHAIN, train_on, TOOLS) == [*expected, answer]


@pytest.mark.parametrize("flag", ["weight", "train", "training"])
@pytest.mark.parametrize("plain", [True, False])
def test_flags_take_turns_out(tmp_path, flag, plain):
    encoder = load_tokenizer(save("chatml", tmp_path, plain=plain))
    talk = [TALK[0], {**TALK[1], flag: 0}, {**TALK[2], flag: None}, {**TALK[3], flag: True}]
    assert learned(encoder, talk) == ["two<|im_end|>"]
    everything, without = encoder.chat(TALK, None, "all"), encoder.chat(talk, None, "all")
    left_out = encoder.chat(TALK[:2], None, "assistant")[1]
    assert everything[1].all()
    assert without[1].tolist() == [*(~left_out).tolist(), *[True] * (len(without[1]) - len(left_out))]
    assert without[0].tolist() == everything[0].tolist(), "a flag is not rendered"


@pytest.mark.parametrize(
    ("number", "flags", "train_on", "message"),
    [
        (1, {"weight": 0.5}, "assistant", r"message 2: weight is 0\.5; a message is learned \(1\) or not \(0\)"),
        (1, {"train": "no"}, "assistant", r"message 2: train is 'no'"),
        (
            0,
            {"weight": 1},
            "assistant",
            r"message 1 \(user\) says that it shall be learned; method.train_on: assistant",
        ),
        (0, {"train": False}, "all", r"message 1 \(user\) says that it shall not be learned; method.train_on: all"),
    ],
)
def test_flags_that_cannot_be_followed_are_named(number, flags, train_on, message):
    talk = [{**turn, **flags} if at == number else turn for at, turn in enumerate(TALK)]
    with pytest.raises(ValueError, match=message):
        choose_turns(talk, train_on)


def test_a_row_whose_learned_turns_say_nothing_is_rejected(tokenizers):
    encoder = load_tokenizer(tokenizers["chatml"])
    blank = {"messages": [*TALK[:3], say("assistant", " ")]}
    off = {"messages": [TALK[0], {**TALK[1], "weight": 0}]}
    assert "empty answer" in Sft(SftConfig(train_on="last_assistant")).encode(blank, "chat", encoder).reason
    assert "empty answer" in Sft(SftConfig(train_on="assistant")).encode(off, "chat", encoder).reason
    assert Sft(SftConfig(train_on="assistant")).encode(blank, "chat", encoder).num_targets > 1


def test_a_turn_costs_two_renderings_and_the_last_one_one(monkeypatch):
    template = ChatTemplate(source("llama3", plain=True), {"bos_token": "<s>"}, where="x", now=NOW)
    rendered = Counter()
    render = ChatTemplate.render_marked

    def counted(self, messages, *rest, **options):
        rendered[len(messages)] += 1
        return render(self, messages, *rest, **options)

    monkeypatch.setattr(ChatTemplate, "render_marked", counted)
    talk = TALK * 10
    assert len(turns_in(template, talk)) == 20
    assert rendered.total() == 2 * 20
    rendered.clear()
    Conversation(template, talk).spans([len(talk) - 1])
    assert rendered.total() == 2


@pytest.mark.parametrize("talk", [CHAIN, [*CHAIN, *TALK], [*CHAIN[:5], *CHAIN[3:], *TALK], [TALK[1], *TALK]])
def test_thinking_dropped_anywhere_leaves_the_other_turns_whole(talk):
    """Chains of calls of which some have thinking, before and behind the last question; and an answer at the start."""
    template = ChatTemplate(source("qwen3", plain=True), {"eos_token": "<|im_end|>"}, where="x", now=NOW)
    marked = ChatTemplate(source("qwen3", plain=False), {"eos_token": "<|im_end|>"}, where="x", now=NOW)
    expected = [f"{turn}\n" for turn in turns_in(marked, talk, TOOLS)]
    assert turns_in(template, talk, TOOLS) == expected


def test_answers_that_begin_like_the_prompts_thinking_are_whole():
    """The prompt opens <think>; an answer that begins with another tag parts from it within `<t`."""
    template = ChatTemplate(
        source("deepseek-r1", plain=True), {"bos_token": "<s>", "eos_token": "</s>"}, where="x", now=NOW
    )
    talk = [say("user", "a"), say("assistant", "<table>"), say("user", "b"), say("assistant", "<thin>")]
    assert turns_in(template, talk) == ["<table><｜end▁of▁sentence｜>", "<thin><｜end▁of▁sentence｜>"]


def published(name):
    text = (PUBLISHED / f"{name}.jinja").read_text()
    return ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}, where=name, now=NOW)


PAIRS = ["cohere", "cohere2", "gemma", "gemma3", "llama3", "lfm2", "phi3", "phi3_5", "qwen3_instruct_2507"]


@pytest.mark.parametrize("name", PAIRS)
def test_published_templates_give_what_trls_training_templates_mark(name):
    talk = [say("user", "Hi."), say("assistant", "<b>Hello</b>"), say("user", "And 2+2?"), say("assistant", "4")]
    marked = published(f"{name}_training")
    assert Conversation(marked, talk).text == Conversation(published(name), talk).text
    text, spans = marked.render_marked(talk)
    mine = Conversation(published(name), talk).spans((1, 3))
    covered = {at for span in spans for at in range(*span)}
    assert {at for span in mine for at in range(*span) if not text[at].isspace()} == {
        at for at in covered if not text[at].isspace()
    }


OF_PICTURES = {"idefics3", "llava_next", "smolvlm"}
"""Templates that take a message's content in parts only."""

SHIPPED = sorted({path.stem for path in PUBLISHED.glob("*.jinja") if "_training" not in path.stem} - OF_PICTURES)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_published_template_has_its_turns_found(name):
    """Each turn is the answer and what ends it, and nothing of the questions."""
    talk = [say("user", "Qone"), say("assistant", "Aone"), say("user", "Qtwo"), say("assistant", "Atwo")]
    turns = turns_in(published(name), talk)
    assert ["Aone" in turns[0], "Atwo" in turns[1], len(turns)] == [True, True, 2]
    assert not any("Q" in turn or "assistant" in turn for turn in turns)


def test_documents_reach_a_template_that_takes_them(tokenizers):
    plain = load_tokenizer(tokenizers["chatml"])
    text = "{% for d in documents %}<doc>{{ d.text }}</doc>{% endfor %}" + source("chatml", plain=True)
    encoder = load_tokenizer(tokenizers["chatml"], None, text)
    assert (plain.takes_documents, encoder.takes_documents) == (False, True)
    ids, mask = encoder.chat(TALK, None, "assistant", [{"text": "known"}])
    assert encoder.decode(ids).startswith("<doc>known</doc><|im_start|>user\na")
    assert mask.sum() == plain.chat(TALK, None, "assistant")[1].sum()


def test_variables_of_a_template_reach_it_and_others_are_refused(tokenizers):
    path, theirs = tokenizers["qwen3"], AutoTokenizer.from_pretrained(tokenizers["qwen3"])
    encoder = load_tokenizer(path, variables={"enable_thinking": False})
    asked = encoder.chat_template.render(TALK[:1], add_generation_prompt=True)
    options = {"tokenize": False, "add_generation_prompt": True}
    assert asked == theirs.apply_chat_template(TALK[:1], enable_thinking=False, **options)
    assert learned(encoder, TALK) == ["one<|im_end|>", "two<|im_end|>"], "the prompt has the empty thinking"
    with pytest.raises(UserError, match=r"does not use enable_thinkng\. It uses: .*enable_thinking"):
        load_tokenizer(path, variables={"enable_thinkng": False})
    published_source = with_defaults(source("qwen3", plain=True), {"enable_thinking": False, "who": 'a "b"\n'})
    theirs.chat_template = published_source
    assert theirs.apply_chat_template(TALK[:1], **options) == asked
    assert theirs.apply_chat_template(TALK[:1], enable_thinking=True, **options) != asked
    again = load_tokenizer(path, None, published_source, variables={"enable_thinking": True})
    assert again.chat_template.render(TALK[:1], add_generation_prompt=True) != asked


def test_the_recipes_variables_reach_training_check_and_the_published_model(tokenizers, tmp_path):
    folder = ModelFolder(tokenizers["qwen3"])
    Path(folder.url, "config.json").write_text("{}")
    model = {"path": folder.url, "chat_template_kwargs": {"enable_thinking": False}}
    recipe = Recipe.model_validate({"name": "x", "model": model, "data": {"train": [{"path": "rows.jsonl"}]}})
    training = pickle.loads(pickle.dumps(open_encoder(spec_of(recipe, folder, now=NOW)))).tokenizer
    looking = make_encoder(recipe, ask_hub=False)
    served = AutoTokenizer.from_pretrained(folder.url, chat_template=published_template(recipe, folder))
    asked = served.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    for encoder in (training, looking):
        assert encoder.chat_template.render(TALK[:1], add_generation_prompt=True) == asked
    assert asked.endswith("<think>\n\n</think>\n\n")
    assert published_template(Recipe.model_validate({**recipe.model_dump(), "model": {"path": "m"}}), folder) is None


def test_variables_without_a_template_are_refused(tmp_path):
    folder = Path(save("chatml", tmp_path))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template to give them to"):
        load_tokenizer(str(folder), variables={"enable_thinking": False})


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.bos])
def test_a_tokenizer_that_adds_the_begin_token_does_not_double_it(tmp_path, name):
    """The template writes it (or leaves it out, as transformers does then); the post-processor must not come on top."""
    folder, bos = Path(save(name, tmp_path)), STYLES[name].bos
    description = json.loads((folder / "tokenizer.json").read_text())
    number = next(token["id"] for token in description["added_tokens"] if token["content"] == bos)
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(description))
    encoder = load_tokenizer(str(folder))
    assert encoder.text("a")[0].tolist().count(number) == 1
    ids, mask = encoder.chat(CONVERSATIONS["single"], None, "assistant")
    assert ids.tolist().count(number) == ("bos_token" in source(name, plain=True))
    assert encoder.tokenizer.id_to_token(int(ids[last_learned(mask)])) in (*STYLES[name].special, STYLES[name].eos)


def last_learned(mask):
    """The last supervised position: the token with which the model ends its turn."""
    return mask.nonzero()[0][-1]


def test_private_characters_in_a_row_are_refused_not_taken_for_marks():
    template = ChatTemplate(source("chatml", plain=False), {}, where="x", now=NOW)
    with pytest.raises(ValueError, match=r"U\+10FFF0"):
        template.render([say("user", "\U0010fff0x\U0010fff1"), say("assistant", "a")])


def test_keys_that_columnar_files_fill_with_null_are_as_if_not_there():
    text = "{% for m in messages %}{{ 'tool_calls' in m }} {{ m.reasoning_content or '-' }};{% endfor %}"
    template = ChatTemplate(text, {}, where="x", now=NOW)
    talk = [say("user", "a", tool_calls=None, thinking=None), say("assistant", "b", reasoning="r", tool_calls=[CALL])]
    assert Conversation(template, talk).text == "False -;True r;"
