"""Copies: rows that are there twice, within a source, across sources, or on both sides of the held-out line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from ..distributed.data.held_out import row_hash
from ..recipes.methods.base import Row, RowId, Sample
from .check_findings import Note

Side = Literal["train", "eval"]
NOT_WORDS = re.compile(r"[\W_]+")

LEAST_PROMPT_TOKENS = 8
"""Shorter prompts are the same by chance, or all template."""


class Print(NamedTuple):
    """Fingerprints of a row: as it is, by its words alone, and of its prompt (None: hardly any)."""

    exact: int
    words: int
    prompt: int | None


Seen = dict[int, RowId]


class Copies:
    """The rows seen so far, by fingerprint. About a kilobyte of memory a row."""

    def __init__(self) -> None:
        self._exact: dict[Side, Seen] = {"train": {}, "eval": {}}
        self._words: dict[Side, Seen] = {"train": {}, "eval": {}}
        self._prompts: dict[Side, Seen] = {"train": {}, "eval": {}}

    def add(self, row: RowId, side: Side, print_: Print) -> Iterator[Note]:
        """What the row is a copy of; the strongest sort only."""
        other: Side = "eval" if side == "train" else "train"
        note = next(self._notes(row, side, other, print_), None)
        self._exact[side].setdefault(print_.exact, row)
        self._words[side].setdefault(print_.words, row)
        if print_.prompt is not None:
            self._prompts[side].setdefault(print_.prompt, row)
        if note:
            yield note

    def _notes(self, row: RowId, side: Side, other: Side, print_: Print) -> Iterator[Note]:
        if twin := self._exact[other].get(print_.exact):
            yield Note("leaked", f"same as {twin}")
        if twin := self._exact[side].get(print_.exact):
            yield Note("duplicate" if twin.source == row.source else "duplicate-across-sources", f"same as {twin}")
        if twin := self._words[other].get(print_.words):
            yield Note("leaked", f"same, but for case, blanks and punctuation, as {twin}")
        if twin := self._words[side].get(print_.words):
            yield Note("near-duplicate", f"like {twin}")
        if print_.prompt is not None and (twin := self._prompts[other].get(print_.prompt)):
            yield Note("leaked-prompt", f"same prompt as {twin}")
        if print_.prompt is not None and (twin := self._prompts[side].get(print_.prompt)):
            yield Note("several-answers", f"same prompt as {twin}")


def fingerprint(values: Row, sample: Sample | None) -> Print:
    """The prompt is what comes before the first supervised token."""
    words = NOT_WORDS.sub(" ", str(sorted(values.items())).casefold())
    prompt = None if sample is None else prompt_digest(sample)
    return Print(row_hash(values), _digest(words.encode("utf-8", "surrogatepass")), prompt)


def prompt_digest(sample: Sample) -> int | None:
    """Of the tokens before the first supervised one."""
    length = first_target(sample)
    return _digest(sample.input_ids[:length].tobytes()) if length >= LEAST_PROMPT_TOKENS else None


def answer_digest(sample: Sample) -> int:
    """Of the supervised tokens."""
    return _digest(sample.input_ids[sample.supervised].tobytes())


def first_target(sample: Sample) -> int:
    """Place of the first supervised token; the sample's length if there is none."""
    targets = np.flatnonzero(sample.supervised)
    return int(targets[0]) if len(targets) else len(sample)


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
