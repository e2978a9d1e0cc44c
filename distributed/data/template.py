"""Text to token ids without torch: the `tokenizers` library and the model's own chat template.

transformers' tokenizers import torch; `ftlaunch plan` and the readers need neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from ...recipes.errors import UserError
from .. import storage
from ..model_files import ModelFolder, find_model
from .chat import ChatTemplate, Message, Span

Encoded = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""Token ids [S] and the mask [S] of supervised ones."""

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer with its chat template; what methods know as `TokenEncoder`.

    `special_tokens`: bos_token and its like, as text. `chat_template` None: chats are refused.
    """

    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    chat_template: ChatTemplate | None
    where: str

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token."""
        return self._id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The begin-of-sequence token."""
        return self._id("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The padding token."""
        return self._id("pad_token")

    def decode(self, input_ids: Sequence[int]) -> str:
        """Token ids back to text, special tokens shown."""
        return str(self.tokenizer.decode([int(token) for token in input_ids], skip_special_tokens=False))

    def chat(self, messages: Sequence[Message], tools: Sequence[Any] | None, train_on: str) -> Encoded:
        """Render a conversation and mark what `train_on` (assistant, last_assistant, all) supervises.

        The template writes its own begin- and end-of-sequence tokens. Raises ValueError for a conversation that the
        template refuses, UserError when there is no template."""
        if self.chat_template is None:
            raise UserError(
                f"the tokenizer of {self.where} has no chat template, which format chat needs. Name one in "
                "model.chat_template, or use format prompt_completion."
            )
        if train_on == "all":
            encoding = self._encode(self.chat_template.render(messages, tools), add_special_tokens=False)
            return _ids(encoding), np.ones(len(encoding.ids), np.bool_)
        text, spans = self.chat_template.spans(messages, tools)
        encoding = self._encode(text, add_special_tokens=False)
        trained = spans[-1:] if train_on == "last_assistant" else spans
        return _ids(encoding), self._mask(encoding, trained, text)

    def prompt_completion(self, prompt: str, completion: str) -> Encoded:
        """Prompt, completion, end of sequence, tokenised as one text; a token across the boundary counts as
        completion, because that is where it is written."""
        encoding = self._encode(prompt + completion, add_special_tokens=True)
        written = _stops(encoding) > len(prompt)
        return self._ended_once(encoding, written & (np.array(encoding.special_tokens_mask) == 0))

    def text(self, text: str) -> Encoded:
        """A document and its end of sequence."""
        encoding = self._encode(text, add_special_tokens=True)
        return self._ended_once(encoding, np.ones(len(encoding.ids), np.bool_))

    def _encode(self, text: str, *, add_special_tokens: bool) -> Encoding:
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds a lone surrogate, which is no character ({error.reason})") from error

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        number = None if token is None else self.tokenizer.token_to_id(token)
        return None if number is None else int(number)

    def _ended_once(self, encoding: Encoding, mask: npt.NDArray[np.bool_]) -> Encoded:
        """Exactly one begin token where the tokenizer adds one, exactly one end token always; the end is supervised."""
        ids, bos, eos = _ids(encoding), self.bos_token_id, self.eos_token_id
        if eos is None:
            raise UserError(
                f"the tokenizer of {self.where} has no end-of-sequence token, so a model could not learn to stop. "
                "Set eos_token in tokenizer_config.json."
            )
        first = 1 if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos else 0
        last = len(ids)
        while last > first and ids[last - 1] == eos:
            last -= 1
        return (
            np.concatenate([ids[first:last], np.array([eos], np.int32)]),
            np.concatenate([mask[first:last], np.ones(1, np.bool_)]),
        )

    @cached_property
    def _special_ids(self) -> npt.NDArray[np.int32]:
        added = self.tokenizer.get_added_tokens_decoder()
        return np.array([number for number, token in added.items() if token.special], np.int32)

    def _mask(self, encoding: Encoding, spans: Sequence[Span], text: str) -> npt.NDArray[np.bool_]:
        """Tokens that overlap a span; blank text behind a span's last special token is no part of the turn."""
        starts, stops = _starts(encoding), _stops(encoding)
        special = np.isin(_ids(encoding), self._special_ids)
        mask = np.zeros(len(starts), np.bool_)
        for start, stop in spans:
            inside = (stops > start) & (starts < stop)
            ends = np.flatnonzero(inside & special)
            if len(ends) and not text[stops[ends[-1]] : stop].strip():
                inside[ends[-1] + 1 :] = False
            mask |= inside
        return mask


def _ids(encoding: Encoding) -> npt.NDArray[np.int32]:
    return np.array(encoding.ids, np.int32)


def _starts(encoding: Encoding) -> npt.NDArray[np.int64]:
    return np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 0]


def _stops(encoding: Encoding) -> npt.NDArray[np.int64]:
    """Where tokens end; a token of no width (trimmed offsets of blanks) counts as one character."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return np.maximum(offsets[:, 1], offsets[:, 0] + 1)


def load_tokenizer(
    path: str, revision: str | None = None, chat_template: str | None = None, *, now: datetime | None = None
) -> TextEncoder:
    """The tokenizer of a folder, fsspec URL or hub id: tokenizer.json with what stands beside it.

    `chat_template`: text of a template that replaces the tokenizer's own. `now`: the date for templates that print
    one; a run passes its start, so that resuming on another day changes nothing. Raises UserError.
    """
    folder = find_model(path, revision, weights=False)
    if "tokenizer.json" not in folder.names:
        raise UserError(
            f"{folder.url} has no tokenizer.json. It holds: {', '.join(folder.names[:10]) or 'nothing'}. "
            "Write one with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...), or name another "
            "in model.tokenizer."
        )
    try:
        tokenizer = Tokenizer.from_str(_read(folder, "tokenizer.json").decode("utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{folder.url}/tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_json(folder, "tokenizer_config.json")
    tokens = _special_tokens(folder, config, tokenizer)
    source = chat_template or _template_source(folder, config)
    template = source and ChatTemplate(source, tokens, where=folder.url, now=now or datetime.now())
    return TextEncoder(tokenizer, tokens, template or None, folder.url)


def _read(folder: ModelFolder, name: str) -> bytes:
    return storage.read_bytes(storage.join(folder.url, name))


def _read_json(folder: ModelFolder, name: str) -> dict[str, Any]:
    if name not in folder.names:
        return {}
    try:
        content: dict[str, Any] = json.loads(_read(folder, name))
    except ValueError as error:
        raise UserError(f"{folder.url}/{name} is not JSON: {error}") from error
    return content


def _special_tokens(folder: ModelFolder, config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Named tokens: tokenizer_config.json first, then special_tokens_map.json, then generation_config.json's ids."""
    named = {**_read_json(folder, "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    tokens = {name: _token_text(named[name]) for name in NAMED_TOKENS if named.get(name) is not None}
    generation = _read_json(folder, "generation_config.json")
    for name in ("bos_token", "eos_token"):
        ids = generation.get(f"{name}_id")
        number = ids[0] if isinstance(ids, list) and ids else ids
        if name not in tokens and isinstance(number, int):
            text = tokenizer.id_to_token(number)
            tokens.update({name: text} if text is not None else {})
    return tokens


def _token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _template_source(folder: ModelFolder, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the one in tokenizer_config.json; of several named ones, `default`."""
    if "chat_template.jinja" in folder.names:
        return _read(folder, "chat_template.jinja").decode("utf-8")
    there = config.get("chat_template") or _read_json(folder, "chat_template.json").get("chat_template")
    if isinstance(there, list):
        named = {entry["name"]: entry["template"] for entry in there}
        return str(named["default"]) if "default" in named else None
    return there
