"""Row formats: which standard columns each one has, and how a format is found from a file's columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .errors import UserError
from .schema import RowFormat

REQUIRED: dict[RowFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Standard columns a row must have."""

OPTIONAL: dict[RowFormat, tuple[str, ...]] = {"chat": ("tools",), "prompt_completion": (), "text": ()}
"""Standard columns a row may have."""


def standard_columns(row_format: RowFormat) -> tuple[str, ...]:
    """All standard columns of a format."""
    return REQUIRED[row_format] + OPTIONAL[row_format]


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
