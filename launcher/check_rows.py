"""What is wrong with one row: with its turns, its tokens, and how it fits into a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from re import Pattern
from typing import Any

import numpy as np
import numpy.typing as npt

from ..distributed.data.pack import NO_TARGETS_LEFT, OVERLONG
from ..distributed.data.template import TextEncoder
from ..recipes.methods.base import Rejected, Row, Sample
from .check_copies import first_target
from .check_findings import Note
from .check_text import any_of, pieces, text_notes
from .sampling import Fault, Looked

LOOP_TOKENS = 64
"""A loop is reported from this length on; rulers and tables of characters are mostly shorter."""

LOOP_PERIODS = range(1, 9)
CJK = "\u2e80"
"""From here on scripts know no blanks between words."""

SIDES: Mapping[Any, str] = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Vocabulary:
    """What the checks need to know of a tokenizer."""

    special_texts: Pattern[str]
    special_ids: npt.NDArray[np.int64]
    bos: int | None
    eos: int | None
    unknown: int | None
    """None also where the unknown token has another meaning, too."""

    @classmethod
    def of(cls, encoder: TextEncoder) -> Vocabulary:
        """Of the recipe's tokenizer."""
        added = encoder.tokenizer.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        bos, eos = encoder.bos_token_id, encoder.eos_token_id
        unknown = encoder.tokenizer.token_to_id(encoder.special_tokens.get("unk_token", ""))
        return cls(
            any_of(list(special.values())),
            np.array([*special, *(token for token in (bos, eos) if token is not None)], np.int64),
            bos,
            eos,
            None if unknown in (bos, eos) else unknown,
        )


def row_notes(looked: Looked, vocabulary: Vocabulary, sequence_length: int) -> Iterator[Note]:
    """Everything about one row that does not need the others."""
    yield from fit_notes(looked, sequence_length)
    if looked.values is None:
        return
    yield from text_notes(list(pieces(looked.values)), vocabulary.special_texts)
    if looked.sample is not None:
        for check in VALUE_CHECKS:
            yield from check(looked.values)
        yield from sample_notes(looked.sample, vocabulary)


def fit_notes(looked: Looked, sequence_length: int) -> Iterator[Note]:
    """What became of the row."""
    sample, fitted = looked.sample, looked.fitted
    if isinstance(fitted, Fault):
        yield Note(fitted.code, fitted.message)
    elif isinstance(fitted, Rejected):
        yield _rejection(fitted, sample, sequence_length)
    elif sample is not None and len(fitted) > 1:
        yield Note("split", f"{len(sample):,} tokens, {len(fitted)} sequences")
    elif sample is not None and len(fitted[0]) < len(sample):
        lost = sample.num_targets - fitted[0].num_targets
        yield Note("truncated", f"{len(sample):,} tokens; {lost:,} of {sample.num_targets:,} supervised ones cut off")


def _rejection(rejected: Rejected, sample: Sample | None, sequence_length: int) -> Note:
    if sample is None or rejected not in (OVERLONG, NO_TARGETS_LEFT):
        return Note("nothing-learned", rejected.detail, group=rejected.reason)
    prompt = first_target(sample)
    if prompt >= sequence_length or rejected == NO_TARGETS_LEFT:
        return Note("prompt-fills-sequence", f"{len(sample):,} tokens, {prompt:,} of them before the answer")
    return Note("overlong", f"{len(sample):,} tokens")


# --- turns --------------------------------------------------------------------------------------------------------


def _turn_notes(values: Row) -> Iterator[Note]:
    """About the turns of a conversation."""
    turns = [turn for turn in values.get("messages") or () if isinstance(turn, Mapping)]
    sides = [SIDES.get(turn.get("role"), "other") for turn in turns]
    if not turns:
        return
    if sides[-1] == "user":
        yield Note("ends-without-answer", f"{len(turns)} turns, the last one by {turns[-1].get('role')}")
    for number, (before, after) in enumerate(itertools.pairwise(sides), start=1):
        if before == after != "other":
            yield Note("repeated-role", f"messages[{number - 1}] and messages[{number}] are both by {after}")
            break
    blank = (number for number, turn in enumerate(turns) if sides[number] == "assistant" and _is_blank(turn))
    if (first := next(blank, None)) is not None:
        yield Note("blank-turn", f"messages[{first}]")


def _is_blank(turn: Mapping[str, Any]) -> bool:
    content = turn.get("content")
    return not (content.strip() if isinstance(content, str) else content) and not turn.get("tool_calls")


def _prompt_notes(values: Row) -> Iterator[Note]:
    """About a prompt and its completion."""
    prompt, completion = values.get("prompt"), values.get("completion")
    if not isinstance(completion, str):
        return
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        yield Note("missing-prompt")
    elif isinstance(prompt, str) and _is_letter(prompt[-1]) and _is_letter(completion[:1]):
        yield Note("glued", f"…{prompt[-12:]}{completion[:12]}…")


def _is_letter(character: str) -> bool:
    """True in scripts that part words by blanks."""
    return character.isalnum() and character < CJK


VALUE_CHECKS: tuple[Callable[[Row], Iterator[Note]], ...] = (_turn_notes, _prompt_notes)
"""Each knows the columns of one family of formats, and has nothing to say about others."""


# --- tokens -------------------------------------------------------------------------------------------------------


def sample_notes(sample: Sample, vocabulary: Vocabulary) -> Iterator[Note]:
    """About the tokens."""
    ids, bos = sample.input_ids, vocabulary.bos
    if bos is not None and bos != vocabulary.eos and ids[0] == bos and np.count_nonzero(ids == bos) > 1:
        again = int(np.flatnonzero(ids == bos)[1])
        yield Note("doubled-bos", f"tokens 0 and {again}")
    if vocabulary.unknown is not None and (unknown := np.count_nonzero(ids == vocabulary.unknown)):
        yield Note("unknown-token", f"{unknown:,} of {len(ids):,} tokens")
    loop, period = longest_loop(ids)
    if loop >= LOOP_TOKENS:
        yield Note("repetitive", f"{loop:,} tokens long, {period} at a time")


def longest_loop(ids: npt.NDArray[np.int32]) -> tuple[int, int]:
    """(length, period) of the longest stretch in which the same few tokens come again and again."""
    lengths = [_loop(ids, period) for period in LOOP_PERIODS]
    best = int(np.argmax(lengths))
    return lengths[best], LOOP_PERIODS[best]


def _loop(ids: npt.NDArray[np.int32], period: int) -> int:
    """Length of the longest stretch that repeats itself after `period` tokens; 0 without any."""
    if len(ids) <= period:
        return 0
    breaks = np.flatnonzero(np.concatenate([[True], ids[period:] != ids[:-period], [True]]))
    run = int(np.diff(breaks).max()) - 1
    return run + period if run > 0 else 0


def ends_in_special(sample: Sample, vocabulary: Vocabulary) -> bool:
    """True if a special token ends what is learned."""
    targets = np.flatnonzero(sample.supervised)
    return bool(len(targets)) and int(sample.input_ids[targets[-1]]) in vocabulary.special_ids
