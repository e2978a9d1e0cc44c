"""What is wrong with one row: with its turns, its tokens, and how it fits into a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from re import Pattern

import numpy as np
import numpy.typing as npt

from ..distributed.data.pack import NO_TARGETS_LEFT, OVERLONG
from ..distributed.data.template import TextEncoder
from ..recipes.messages import Message
from ..recipes.methods.base import Rejected, Sample
from ..recipes.rows import (
    BinaryPreference,
    Completion,
    Conversation,
    Parsed,
    Preference,
    Ranking,
    Turns,
    parse_row,
)
from ..recipes.schema import RowFormat
from .check_copies import first_target
from .check_findings import Note
from .check_text import any_of, pieces, text_notes
from .sampling import Fault, Looked

LOOP_TOKENS = 64
"""A loop is reported from this length on; rulers and tables of characters are mostly shorter."""

LOOP_PERIODS = range(1, 9)
LONG_PERIODS = (5, 6, 7, 8)
"""Each shorter period has a multiple among them, so that a row without loops is known from these alone."""

CJK = "\u2e80"
"""From here on scripts know no blanks between words."""

SIDES = ("user", "assistant")
"""They take turns; systems and tools may speak several times in a row."""


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


def row_notes(looked: Looked, row_format: RowFormat, vocabulary: Vocabulary, sequence_length: int) -> Iterator[Note]:
    """Everything about one row that does not need the others."""
    yield from fit_notes(looked, sequence_length)
    if looked.values is None:
        return
    yield from text_notes(list(pieces(looked.values)), vocabulary.special_texts)
    if looked.sample is not None:
        yield from parsed_notes(parse_row(looked.values, row_format))
        yield from sample_notes(looked.sample, vocabulary)
    elif looked.parsed is not None:
        yield from parsed_notes(looked.parsed)


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


def parsed_notes(row: Parsed) -> Iterator[Note]:
    """About what is asked and answered, whatever format it is written in."""
    match row:
        case Completion():
            yield from _completion_notes(row)
        case Conversation() if row.messages:
            yield from _conversation_notes(row.messages)
        case Preference():
            yield from _answers_notes(row, {"chosen": row.chosen, "rejected": row.rejected})
        case BinaryPreference():
            yield from _answers_notes(row, {"completion": row.completion})
        case Ranking():
            yield from _answers_notes(row, {f"response {n}": one for n, one in enumerate(row.responses)})
            if len(set(row.scores)) == 1:
                yield Note("equal-scores", f"{len(row.scores)} responses")


def _conversation_notes(turns: Sequence[Message]) -> Iterator[Note]:
    roles = [turn["role"] for turn in turns]
    if roles[-1] == "user":
        yield Note("ends-without-answer", f"{len(turns)} turns")
    pairs = enumerate(itertools.pairwise(roles))
    if (twice := next((number for number, (one, next_) in pairs if one == next_ in SIDES), None)) is not None:
        yield Note("repeated-role", f"turns {twice} and {twice + 1} are both by {roles[twice]}")
    blank = (number for number, turn in enumerate(turns) if roles[number] == "assistant" and _is_blank(turn))
    if (first := next(blank, None)) is not None:
        yield Note("blank-turn", f"turn {first}")
    before = turns[: roles.index("assistant")] if "assistant" in roles else turns
    if all(_is_blank(turn) for turn in before):
        yield Note("missing-prompt")


def _is_blank(turn: Message) -> bool:
    return not (turn.get("content") or "").strip() and not turn.get("tool_calls")


def _completion_notes(row: Completion) -> Iterator[Note]:
    if not row.prompt.strip() and not row.documents:
        yield Note("missing-prompt")
    elif _is_letter(row.prompt[-1:]) and _is_letter(row.completion[:1]):
        yield Note("glued", f"…{row.prompt[-12:]}{row.completion[:12]}…")


def _answers_notes(row: Preference | BinaryPreference | Ranking, answers: Mapping[str, Turns]) -> Iterator[Note]:
    """About what is compared, or judged, by its name."""
    if _says_nothing(row.prompt) and not row.documents:
        yield Note("missing-prompt")
    if (blank := next((name for name, answer in answers.items() if _says_nothing(answer)), None)) is not None:
        yield Note("empty-answer", blank)
    pairs = itertools.combinations(answers.items(), 2)
    if equal := next(((one, other) for (one, said), (other, again) in pairs if said == again), None):
        yield Note("equal-answers", " and ".join(equal))


def _says_nothing(turns: Turns) -> bool:
    return not turns.strip() if isinstance(turns, str) else all(map(_is_blank, turns))


def _is_letter(character: str) -> bool:
    """True in scripts that part words by blanks."""
    return character.isalnum() and character < CJK


# --- tokens -------------------------------------------------------------------------------------------------------


def sample_notes(sample: Sample, vocabulary: Vocabulary) -> Iterator[Note]:
    """About the tokens."""
    ids, bos = sample.input_ids, vocabulary.bos
    if bos is not None and bos != vocabulary.eos and ids[0] == bos and np.count_nonzero(ids == bos) > 1:
        again = int(np.flatnonzero(ids == bos)[1])
        yield Note("doubled-bos", f"tokens 0 and {again}")
    if vocabulary.unknown is not None and (unknown := np.count_nonzero(ids == vocabulary.unknown)):
        yield Note("unknown-token", f"{unknown:,} of {len(ids):,} tokens")
    if any(_loop(ids, period) >= LOOP_TOKENS for period in LONG_PERIODS):
        loop, period = longest_loop(ids)
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
