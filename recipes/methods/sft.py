"""Supervised fine-tuning: cross-entropy on what the model shall learn to write, and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..formats import require_readable
from ..messages import Message
from ..rows import Completion, Conversation, Documents, Parsed, Text, Tokenized, parse_row, written_out
from ..schema import RowFormat
from ..schema import Sft as SftConfig
from .base import Batch, LossTerms, Models, Rejected, Row, RowId, Sample, TokenEncoder
from .causal import count_targets, cross_entropy, lay_out
from .turns import choose_turns

if TYPE_CHECKING:
    import torch

NOWHERE = RowId(source="", file="", row=0, block=0)
"""The row of a sample before its reader has filled in where it lies."""

Encoded = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]


class Sft:
    """The `sft` method."""

    needs: frozenset[str] = frozenset()
    name = "sft"

    def __init__(self, config: SftConfig) -> None:
        self.train_on = config.train_on

    def encode(self, row: Row, row_format: RowFormat, encoder: TokenEncoder) -> Sample | Rejected:
        require_readable(row_format, self.name, "data")
        encoded = self._encode(parse_row(row, row_format), encoder)
        if isinstance(encoded, Rejected):
            return encoded
        sample = Sample(*encoded, row=NOWHERE)
        return sample if sample.num_targets else Rejected("nothing to learn: no supervised token")

    def collate(self, bins: Sequence[Sequence[Sample]], length: int) -> Batch:
        return lay_out(bins, length)

    def weight(self, batch: Batch) -> float:
        return count_targets(batch)

    def loss(self, models: Models, batch: Mapping[str, torch.Tensor]) -> LossTerms:
        return cross_entropy(models, batch)

    def _encode(self, row: Parsed, encoder: TokenEncoder) -> Encoded | Rejected:
        match row:
            case Text(text):
                return encoder.text(text) if text.strip() else Rejected("empty text")
            case Tokenized(input_ids, supervised):
                return (input_ids, supervised) if len(input_ids) > 1 else Rejected("empty text: fewer than two tokens")
            case Completion():
                return self._completion(row, encoder)
            case Conversation():
                return self._conversation(row, encoder)
        raise AssertionError(f"a {type(row).__name__} is no row for sft")  # require_readable lets none through

    def _completion(self, row: Completion, encoder: TokenEncoder) -> Encoded | Rejected:
        if not row.completion.strip():
            return Rejected("empty answer: the completion is blank")
        input_ids, mask = encoder.prompt_completion(_with_documents(row.documents, row.prompt), row.completion)
        return input_ids, np.ones_like(mask) if self.train_on == "all" else mask

    def _conversation(self, row: Conversation, encoder: TokenEncoder) -> Encoded | Rejected:
        if not row.messages:
            return Rejected("empty conversation")
        messages = row.messages if self.train_on == "all" else _only_read(row.messages, row.context)
        learned = choose_turns(messages, self.train_on).learned
        if self.train_on != "all" and not any(_has_answer(messages[number]) for number in learned):
            return Rejected("empty answer: no assistant turn says anything")
        if not row.documents:
            return encoder.chat(messages, row.tools, self.train_on)
        if encoder.takes_documents:
            return encoder.chat(messages, row.tools, self.train_on, row.documents)
        return encoder.chat(_asked_with(row.documents, messages), row.tools, self.train_on)


def _only_read(messages: list[Message], context: int) -> list[Message]:
    """The assistant's turns among the first messages are marked as not to be learned."""
    return [
        {**message, "train": False} if number < context and message["role"] == "assistant" else message
        for number, message in enumerate(messages)
    ]


def _asked_with(documents: Documents, messages: list[Message]) -> list[Message]:
    """The documents stand in the first question, so that every answer comes after them; see `written_out`."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("documents, and no message of the user that they could stand before")
    question = {**messages[first], "content": _with_documents(documents, messages[first].get("content") or "")}
    return [*messages[:first], question, *messages[first + 1 :]]


def _with_documents(documents: Documents, prompt: str) -> str:
    return f"{written_out(documents)}\n\n{prompt}" if documents else prompt


def _has_answer(message: Message) -> bool:
    return bool((message.get("content") or "").strip()) or bool(message.get("tool_calls"))
