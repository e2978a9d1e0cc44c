"""Supervised fine-tuning: cross-entropy on what the model shall learn to write, and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..schema import RowFormat
from ..schema import Sft as SftConfig
from .base import Batch, LossTerms, Models, Rejected, Row, RowId, Sample, TokenEncoder
from .causal import count_targets, cross_entropy, lay_out

if TYPE_CHECKING:
    import torch

NOWHERE = RowId(source="", file="", row=0, block=0)
"""The row of a sample before its reader has filled in where it lies."""

Encoded = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]


class Sft:
    """The `sft` method."""

    needs: frozenset[str] = frozenset()

    def __init__(self, config: SftConfig) -> None:
        self.train_on = config.train_on

    def encode(self, row: Row, row_format: RowFormat, encoder: TokenEncoder) -> Sample | Rejected:
        encode = {"chat": self._chat, "prompt_completion": self._prompt_completion, "text": _text}[row_format]
        encoded = encode(row, encoder)
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

    def _chat(self, row: Row, encoder: TokenEncoder) -> Encoded | Rejected:
        messages = row["messages"]
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise ValueError(f"messages is {type(messages).__name__}; expected a list of {{role, content}}")
        if not messages:
            return Rejected("empty conversation")
        if self.train_on != "all" and not any(_has_answer(message) for message in messages):
            return Rejected("empty answer: no assistant turn says anything")
        return encoder.chat(messages, row.get("tools"), self.train_on)

    def _prompt_completion(self, row: Row, encoder: TokenEncoder) -> Encoded | Rejected:
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        if not completion.strip():
            return Rejected("empty answer: the completion is blank")
        input_ids, mask = encoder.prompt_completion(prompt, completion)
        return input_ids, np.ones_like(mask) if self.train_on == "all" else mask


def _text(row: Row, encoder: TokenEncoder) -> Encoded | Rejected:
    text = _string(row, "text")
    return encoder.text(text) if text.strip() else Rejected("empty text")


def _has_answer(message: Mapping[str, Any]) -> bool:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"a message is {message!r:.80}; expected {{role, content}}")
    if message["role"] != "assistant":
        return False
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{column} is {type(value).__name__}; expected text")
    return value
