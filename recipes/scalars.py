"""What unquoted words mean in YAML 1.2: the core schema, and nothing more (`on`, `1_000` and dates are text)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# YAML 1.2.2, 10.3.2 "Core schema: tag resolution", in its order.
_CORE: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]{1,4000}"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float("-inf" if text[0] == "-" else "inf")),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda text: float("nan")),
)


def core_value(text: str) -> Any:
    """What an unquoted scalar means in YAML 1.2."""
    for pattern, convert in _CORE:
        if pattern.fullmatch(text):
            return convert(text)
    return text
