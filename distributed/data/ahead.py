"""Rows that are looked at some at a time, so that their texts are tokenised at once.

A tokenizer lets go of the interpreter lock while it works, and for short texts taking the lock again costs as much as
the work: streams that encode row by row in threads of their own get in each other's way. What is prepared here changes
no row, no order and no state: whoever encodes a row finds its tokens there, or makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ...recipes.errors import UserError
from ...recipes.schema import RowFormat

AHEAD_ROWS = 32

AHEAD_CHARACTERS = 2**16
"""Of the texts that are prepared at once; long texts are work enough by themselves, and would fill memory."""

TEXT_COLUMNS: dict[RowFormat, str] = {"text": "text"}
"""Formats whose rows are tokenised as they stand, and the standard column that holds the text. Others are put into
words by a method and a template first, which takes longer than the lock costs."""


class Drawn(NamedTuple):
    """A row and where it lies. `kept`: whether it is trained on, or held out."""

    block: int
    row: int
    values: dict[str, Any]
    kept: bool = True


Look = Callable[[Iterator[Drawn]], list[Drawn]]
"""Takes some of the rows to come, at least one, and gives them back prepared. Raises what reading the first raises."""


@runtime_checkable
class PreparesTexts(Protocol):
    """A tokenizer that takes texts ahead, many at once."""

    def prepare(self, texts: Sequence[str]) -> None:
        """Tokenise texts that will soon be asked for."""
        ...


def one_by_one(rows: Iterator[Drawn]) -> list[Drawn]:
    """Nothing is prepared."""
    return [next(rows)]


def look_ahead(encode: object, format_of: Callable[[int], RowFormat]) -> Look:
    """How rows are looked at for an encoder of rows; `format_of` a block."""
    tokenizer = getattr(encode, "tokenizer", None)
    return _Texts(tokenizer, format_of) if isinstance(tokenizer, PreparesTexts) else one_by_one


class _Texts:
    def __init__(self, tokenizer: PreparesTexts, format_of: Callable[[int], RowFormat]) -> None:
        self._tokenizer = tokenizer
        self._format_of = format_of

    def __call__(self, rows: Iterator[Drawn]) -> list[Drawn]:
        """Some rows up to the first that is no text, their texts tokenised."""
        taken: list[Drawn] = []
        texts: list[str] = []
        characters = 0
        try:
            for drawn in islice(rows, AHEAD_ROWS):
                taken.append(drawn)
                text = drawn.values.get(TEXT_COLUMNS.get(self._format_of(drawn.block), ""))
                if not isinstance(text, str):
                    break
                characters += len(text)
                if drawn.kept and text.strip():  # blank ones are refused
                    texts.append(text)
                if characters > AHEAD_CHARACTERS:
                    break
        except UserError:  # of a broken row: the rows before it are served first
            if not taken:
                raise
        if len(texts) > 1:
            self._tokenizer.prepare(texts)
        return taken
