"""What can be seen in a row's text itself, whatever its format. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .check_findings import Note

LEAST_SPECIAL_CHARACTERS = 3
"""Shorter special tokens are also ordinary text."""

TEMPLATE_MARKS = re.compile(
    r"<\|[A-Za-z0-9_]{2,30}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜[^｜<>]{2,30}｜>"
)
"""Marks of the chat templates in use: ChatML, Llama 2 and 3, Phi, Gemma, DeepSeek."""

MOJIBAKE = re.compile(
    r"Ã[\u0080-\u00bf\u0192\u0160\u0161\u0178\u017d\u017e\u2018-\u201e\u2020-\u2022\u20ac\u2122]|â€[\u0080-\u00bf\u0153\u2122\u02dc\u201c\u201d¦]|Â[\u00a0-\u00bf]"
)
"""Two-byte letters, typographic quotes and Latin-1 signs, as they look when UTF-8 is read as Latin-1 or cp1252."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x9f\ufffe\uffff]")
"""All but tab, line feed, form feed and carriage return."""

SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bhf_[A-Za-z0-9]{34}\b"
    r"|\bsk-[A-Za-z0-9_-]{32,}|\bxox[baprs]-[A-Za-z0-9-]{20,}|\bAIza[0-9A-Za-z_-]{35}\b"
)
"""Keys with a form of their own: PEM, AWS, GitHub, Hugging Face, OpenAI and Anthropic, Slack, Google."""

EXCERPT_CHARACTERS = 24


class Piece(NamedTuple):
    """A text within a row, and where: `messages[1].content`."""

    place: str
    text: str


def pieces(value: Any, place: str = "") -> Iterator[Piece]:
    """All texts of nested mappings and lists."""
    if isinstance(value, str):
        yield Piece(place, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from pieces(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            yield from pieces(item, f"{place}[{number}]")


def any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds any of the tokens; the longest first, since one may begin another."""
    long = sorted((token for token in tokens if len(token) >= LEAST_SPECIAL_CHARACTERS), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, long)) or r"(?!)")


def text_notes(texts: Sequence[Piece], special_tokens: re.Pattern[str]) -> Iterator[Note]:
    """One note of each kind at most: the first place."""
    yield from _first("special-token-in-text", special_tokens, texts)
    foreign = [Piece(place, special_tokens.sub(" ", text)) for place, text in texts if "<" in text or "[" in text]
    yield from _first("template-marks", TEMPLATE_MARKS, foreign)
    for code, pattern in (("wrong-encoding", MOJIBAKE), ("control-character", CONTROL)):
        yield from _first(code, pattern, texts)
    if lost := next((piece for piece in texts if "\ufffd" in piece.text), None):
        yield Note("replacement-character", f"{_excerpt(lost.text, lost.text.index(chr(0xFFFD)))} in {lost.place}")
    if hidden := next((piece for piece in texts if SECRETS.search(piece.text)), None):
        yield Note("secret", f"in {hidden.place}")  # never quoted: reports travel


def _first(code: str, pattern: re.Pattern[str], texts: Sequence[Piece]) -> Iterator[Note]:
    for place, text in texts:
        if match := pattern.search(text):
            yield Note(code, f"{match[0]!r} in {place}")
            return


def _excerpt(text: str, at: int) -> str:
    begin = max(0, at - EXCERPT_CHARACTERS // 2)
    return repr(text[begin : begin + EXCERPT_CHARACTERS])
