"""Row formats: which standard columns each one has, which methods read it, and how it is found from a file's columns.

How a row of each format is read stands in `rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .errors import UserError
from .schema import RowFormat


class Columns(NamedTuple):
    """Standard columns that a row must have, and those it may have."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


COLUMNS: dict[RowFormat, Columns] = {
    "chat": Columns(("messages",), ("tools", "documents")),
    "sharegpt": Columns(("conversations",), ("system", "tools", "documents")),
    "alpaca": Columns(("instruction", "output"), ("input", "system", "history", "documents")),
    "prompt_completion": Columns(("prompt", "completion"), ("tools", "documents")),
    "text": Columns(("text",)),
    "tokenized": Columns(("input_ids",), ("supervised", "labels")),
    "preference": Columns(("chosen", "rejected"), ("prompt", "tools", "documents")),
    "binary_preference": Columns(("prompt", "completion", "label"), ("tools", "documents")),
    "ranking": Columns(("prompt", "responses"), ("scores", "ranks", "tools", "documents")),
}

REQUIRED: dict[RowFormat, tuple[str, ...]] = {name: columns.required for name, columns in COLUMNS.items()}
"""Standard columns a row must have."""

READ_BY: dict[str, tuple[RowFormat, ...]] = {
    "sft": ("chat", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized"),
    "cpt": ("text", "tokenized"),
}
"""`method.type` -> the formats it learns from."""


def standard_columns(row_format: RowFormat) -> tuple[str, ...]:
    """All standard columns of a format."""
    return COLUMNS[row_format].required + COLUMNS[row_format].optional


def detect_format(columns: Iterable[str], mapping: Mapping[str, str] | None = None, where: str = "") -> RowFormat:
    """The one format that these file columns (renamed by `mapping`, standard -> file) fit.

    Raises UserError, listing the columns, when none or several do."""
    there = list(columns)
    renamed = mapping or {}
    fits = [name for name, needed in REQUIRED.items() if all(renamed.get(column, column) in there for column in needed)]
    if len(fits) == 1:
        return fits[0]
    listed = ", ".join(there) or "none"
    if fits:
        raise UserError(f"{where}: the columns ({listed}) fit {' and '.join(fits)}. Say which with `format:`.")
    wanted = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in REQUIRED.items())
    raise UserError(
        f"{where}: the columns ({listed}) fit no row format ({wanted}). Name yours: `columns: {{messages: YOURS}}`."
    )


def require_columns(columns: Iterable[str], row_format: RowFormat, mapping: Mapping[str, str], where: str) -> None:
    """Raises UserError that names the missing column, the ones there are, and how to map."""
    there = list(columns)
    for column in REQUIRED[row_format]:
        if mapping.get(column, column) not in there:
            raise UserError(
                f"{where}: no column '{mapping.get(column, column)}', which format {row_format} needs. "
                f"Columns there: {', '.join(there) or 'none'}. "
                f"If it has another name, write `columns: {{{column}: NAME}}`."
            )


def require_readable(row_format: RowFormat, method: str, where: str) -> None:
    """Raises UserError when a method does not learn from a format."""
    if row_format not in READ_BY[method]:
        raise UserError(
            f"{where}: its rows are in format {row_format}, and method {method} reads {', '.join(READ_BY[method])}. "
            "Take another method, or say with `format:` and `columns:` how its rows are to be read."
        )
