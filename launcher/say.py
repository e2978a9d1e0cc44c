"""Lines for people, as they are: what they quote from files is never taken for markup, and never broken."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def say(console: Console, line: str, style: str = "") -> None:
    """Print one."""
    console.print(Text(line, style=style), soft_wrap=True, highlight=False)
