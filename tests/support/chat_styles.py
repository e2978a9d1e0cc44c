"""Chat-template styles as they are published, with small tokenizers, and their masks written out token by token.

`python tests/support/chat_styles.py` writes the golden files anew; read every line of the difference before committing.

The templates in tests/unit/data/styles render the published formats. They have `{% generation %}` blocks around what
the assistant writes; without them (`plain`) a template is what its model ships.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ftlaunch.distributed.data.template import TextEncoder, load_tokenizer

DATA = Path(__file__).parents[1] / "unit" / "data"
NOW = datetime(2024, 7, 26)


class Style(NamedTuple):
    """A style's special tokens, its other added tokens, and the conversations that it knows how to render."""

    bos: str | None
    eos: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    knows: tuple[str, ...] = ("single", "turns", "odd")


QWEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ALL = ("single", "turns", "tools", "thinking", "odd")
WITH_TOOLS = ("single", "turns", "tools", "odd")

STYLES: dict[str, Style] = {
    "chatml": Style(None, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "llama3": Style(
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        knows=WITH_TOOLS,
    ),
    "qwen2.5": Style(
        None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>"), WITH_TOOLS
    ),
    "qwen3": Style(None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), QWEN, ALL),
    "mistral": Style(
        "<s>",
        "</s>",
        (
            *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
            *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        knows=WITH_TOOLS,
    ),
    "gemma": Style("<bos>", "<eos>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    "phi3": Style(
        "<s>", "<|endoftext|>", ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    ),
    "phi4": Style("<|endoftext|>", "<|im_end|>", ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    "zephyr": Style("<s>", "</s>", ("<s>", "</s>")),
    "deepseek-r1": Style(
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        ("<think>", "</think>"),
        ("single", "turns", "thinking", "odd"),
    ),
}

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content, **more}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single": [say("user", "Wie heißt du? 你好 🙂"), say("assistant", "I am a model — naïve 🙂")],
    "turns": [
        say("system", "Be brief."),
        say("user", "Hi there."),
        say("assistant", "Hello!"),
        say("user", "And 2+2?"),
        say("assistant", "4"),
    ],
    "tools": [
        say("user", "What is 2+2?"),
        say("assistant", "", tool_calls=[CALL]),
        say("tool", "4", name="add", tool_call_id="abcdefghi"),
        say("assistant", "It is 4."),
        say("user", "Thanks."),
        say("assistant", "Bye."),
    ],
    "thinking": [
        say("user", "Hi there."),
        say("assistant", "<think>\nA greeting.\n</think>\n\nHello!"),
        say("user", "What is 2+2?"),
        say("assistant", "<think>\nFour.\n</think>\n\nIt is 4."),
    ],
    "odd": [
        say("user", "  Say <|im_end|> and </s>.\n"),
        say("assistant", "\n  <|im_end|></s> <b>ok</b>  \n"),
        say("user", " "),
        say("assistant", "<|im_start|>user\nno\n"),
    ],
}
"""`odd`: blanks at both ends, and text that spells special tokens."""


def source(name: str, *, plain: bool) -> str:
    """A style's template, with its `{% generation %}` blocks or without."""
    text = (DATA / "styles" / f"{name}.jinja").read_text()
    return text.replace("endgeneration %}", "endif %}").replace(" generation %}", " if true %}") if plain else text


@cache
def vocabulary() -> str:
    """A byte-level BPE over the conversations and the templates' words, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [source(name, plain=True) for name in STYLES] + [json.dumps(list(CONVERSATIONS.values()))]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts * 2, trainer)
    return tokenizer.to_str()


def save(name: str, folder: Path, *, plain: bool = True) -> str:
    """A style's tokenizer in a folder, as transformers saves it; its path."""
    style, tokenizer = STYLES[name], Tokenizer.from_str(vocabulary())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in style.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in style.added])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=style.bos, eos_token=style.eos)
    fast.chat_template = source(name, plain=plain)
    fast.save_pretrained(folder)
    return str(folder)


def tools_of(conversation: str) -> list[Any] | None:
    """The tools that a conversation comes with."""
    return TOOLS if conversation == "tools" else None


def written_out(encoder: TextEncoder, conversation: str) -> list[str]:
    """A line for each token, with `+` where it is learned; the reason where the template refuses the conversation."""
    try:
        ids, mask = encoder.chat(CONVERSATIONS[conversation], tools_of(conversation), "assistant")
    except ValueError as error:
        return [f"refused: {error}"]
    tokens = [shown(encoder.tokenizer, token) for token in ids.tolist()]
    return [f"{'+' if learned else ' '} {token}" for token, learned in zip(tokens, mask.tolist(), strict=True)]


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as text in quotation marks, or as bytes where it is a part of a character."""
    text = str(tokenizer.id_to_token(token))
    if token in tokenizer.get_added_tokens_decoder():
        return text
    raw = bytes(BYTES[character] for character in text)
    try:
        return json.dumps(raw.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(raw)[1:]


PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
OTHERS = tuple(byte for byte in range(256) if byte not in PRINTABLE)
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + number): byte for number, byte in enumerate(OTHERS)}
"""How byte-level tokenizers write bytes as characters (GPT-2's table)."""


def golden(name: str, folder: Path) -> str:
    """The text of a style's golden file."""
    encoder = load_tokenizer(save(name, folder), now=NOW)
    parts = [[f"# {conversation}", *written_out(encoder, conversation)] for conversation in STYLES[name].knows]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


if __name__ == "__main__":
    import tempfile

    for style_name in STYLES:
        with tempfile.TemporaryDirectory() as temporary:
            (DATA / "golden" / f"{style_name}.txt").write_text(golden(style_name, Path(temporary)))
