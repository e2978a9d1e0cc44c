"""Text to token ids without torch: the `tokenizers` library and the model's own chat template.

transformers' tokenizers import torch; `ftlaunch plan` and the readers need neither.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from ...recipes.errors import UserError
from ...recipes.methods.turns import choose_turns
from .. import storage
from ..model_files import ModelFolder, find_model
from .chat import ChatTemplate, Message, Span
from .spans import Conversation

Encoded = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""Token ids [S] and the mask [S] of supervised ones."""

MOST_PREPARED = 2**14
"""Documents whose tokens wait for being asked for; those of a rank's streams are far fewer."""

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
    _prepared: dict[str, npt.NDArray[np.int32]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token."""
        return self._id("eos_token")

    @cached_property
    def bos_token_id(self) -> int | None:
        """The begin-of-sequence token."""
        return self._id("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The padding token."""
        return self._id("pad_token")

    @property
    def takes_documents(self) -> bool:
        """Whether the chat template has a place of its own for retrieved documents."""
        return self.chat_template is not None and self.chat_template.takes_documents

    def decode(self, input_ids: Sequence[int]) -> str:
        """Token ids back to text, special tokens shown."""
        return str(self.tokenizer.decode([int(token) for token in input_ids], skip_special_tokens=False))

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        train_on: str,
        documents: Sequence[Any] | None = None,
    ) -> Encoded:
        """Render a conversation and mark what `train_on` (assistant, last_assistant, completion, all) and the messages'
        own flags supervise: the assistant's words and the token that ends its turn.

        The template writes its own begin- and end-of-sequence tokens. Raises ValueError for a conversation that the
        template refuses, UserError when there is no template or the turns cannot be found."""
        if self.chat_template is None:
            raise UserError(
                f"the tokenizer of {self.where} has no chat template, which format chat needs. Name one in "
                "model.chat_template, or use format prompt_completion."
            )
        conversation = Conversation(self.chat_template, messages, tools, documents)
        turns = choose_turns(messages, train_on)
        encoding = self._encode(conversation.text, add_special_tokens=False)
        if train_on == "all":
            return _ids(encoding), ~self._mask(encoding, conversation, turns.left_out)
        return _ids(encoding), self._mask(encoding, conversation, turns.learned)

    def prompt_completion(self, prompt: str, completion: str) -> Encoded:
        """Prompt, completion, end of sequence, tokenised as one text; a token across the boundary counts as
        completion, because that is where it is written."""
        encoding = self._encode(prompt + completion, add_special_tokens=True)
        mask = np.array(encoding.special_tokens_mask) == 0
        mask[: bisect_right(encoding.offsets, len(prompt), key=_stop)] = False
        ids, kept = self._ended_once(encoding)
        return ids, np.append(mask[kept], True)

    def text(self, text: str) -> Encoded:
        """A document and its end of sequence."""
        ids = self._prepared.pop(text, None)
        if ids is None:
            ids, _ = self._ended_once(self._encode(text, add_special_tokens=True, offsets=False))
        return ids, _all_true(len(ids))

    def prepare(self, texts: Sequence[str]) -> None:
        """Tokenise documents that `text` will soon be asked for. What it does not find it makes, the same."""
        if len(self._prepared) > MOST_PREPARED:  # some were never asked for
            self._prepared.clear()
        with suppress(Exception):  # `text` meets it again, and knows of which document
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
            for text, encoding in zip(texts, encodings, strict=True):
                self._prepared[text], _ = self._ended_once(encoding)

    def _encode(self, text: str, *, add_special_tokens: bool, offsets: bool = True) -> Encoding:
        """One text, as a batch of its own: `encode` holds the interpreter lock while it works, batches let go of it.
        Offsets cost a third of the time."""
        encode = self.tokenizer.encode_batch if offsets else self.tokenizer.encode_batch_fast
        try:
            (encoding,) = encode([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:  # of `tokenizers` 0.21, and of later ones
            raise ValueError("the text holds a lone surrogate, which is no character") from error
        return encoding

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        number = None if token is None else self.tokenizer.token_to_id(token)
        return None if number is None else int(number)

    def _ended_once(self, encoding: Encoding) -> tuple[npt.NDArray[np.int32], slice]:
        """Exactly one begin token where the tokenizer adds one, exactly one end token always, which is supervised; and
        the tokens of the encoding that stand before it."""
        ids, bos, eos = encoding.ids, self.bos_token_id, self.eos_token_id  # a list is made at each access
        if eos is None:
            raise UserError(
                f"the tokenizer of {self.where} has no end-of-sequence token, so a model could not learn to stop. "
                "Set eos_token in tokenizer_config.json."
            )
        first = 1 if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos else 0
        last = len(ids)
        while last > first and ids[last - 1] == eos:
            last -= 1
        ids[last:] = (eos,)
        return np.fromiter(ids[first:] if first else ids, np.int32, last + 1 - first), slice(first, last)

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    def _mask(self, encoding: Encoding, conversation: Conversation, turns: Iterable[int]) -> npt.NDArray[np.bool_]:
        """Tokens that overlap what the assistant wrote in these turns. Blank text behind the token that ends a turn is
        the template's own, unless the template says otherwise."""
        ids, text = encoding.ids, conversation.text  # a list made anew at each access, as are offsets
        mask = np.zeros(len(ids), np.bool_)
        spans = conversation.spans(turns)
        offsets = encoding.offsets if spans else []
        for start, stop in spans:
            first, behind = bisect_right(offsets, start, key=_stop), bisect_left(offsets, stop, key=_start)
            if not conversation.says_spans:
                behind = self._end_of_turn(ids[first:behind], offsets[first:behind], text) + first
            mask[first:behind] = True
        return mask

    def _end_of_turn(self, ids: Sequence[int], offsets: Sequence[Span], text: str) -> int:
        """How many of these tokens the last added one ends, if only blank text follows it; else all."""
        for end in range(len(ids), 0, -1):
            if ids[end - 1] in self._added_ids:
                return end
            if text[slice(*offsets[end - 1])].strip():
                break
        return len(ids)


_TRUE = np.ones(2**14, np.bool_)
_TRUE.flags.writeable = False  # documents share it


def _all_true(length: int) -> npt.NDArray[np.bool_]:
    return _TRUE[:length] if length <= len(_TRUE) else np.ones(length, np.bool_)


def _ids(encoding: Encoding) -> npt.NDArray[np.int32]:
    return np.array(encoding.ids, np.int32)


def _start(offset: Span) -> int:
    return offset[0]


def _stop(offset: Span) -> int:
    """Where a token ends; one of no width (trimmed offsets of blanks) counts as one character."""
    return max(offset[1], offset[0] + 1)


def load_tokenizer(
    path: str,
    revision: str | None = None,
    chat_template: str | None = None,
    *,
    now: datetime | None = None,
    variables: Mapping[str, Any] | None = None,
) -> TextEncoder:
    """The tokenizer of a folder, fsspec URL or hub id: tokenizer.json with what stands beside it.

    `chat_template`: text of a template that replaces the tokenizer's own. `now`: the date for templates that print
    one; a run passes its start, so that resuming on another day changes nothing. `variables`: more of the template's.
    Raises UserError.
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
    source = chat_template or template_source(folder)
    if variables and not source:
        raise UserError(
            f"model.chat_template_kwargs: the tokenizer of {folder.url} has no chat template to give them to."
        )
    template = source and ChatTemplate(source, tokens, where=folder.url, now=now or datetime.now(), variables=variables)
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


def template_source(folder: ModelFolder) -> str | None:
    """chat_template.jinja, or the one in tokenizer_config.json; of several named ones, `default`."""
    if "chat_template.jinja" in folder.names:
        return _read(folder, "chat_template.jinja").decode("utf-8")
    config = _read_json(folder, "tokenizer_config.json")
    there = config.get("chat_template") or _read_json(folder, "chat_template.json").get("chat_template")
    if isinstance(there, list):
        named = {entry["name"]: entry["template"] for entry in there}
        return str(named["default"]) if "default" in named else None
    return there
