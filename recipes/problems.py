"""What is wrong with a recipe: problems with a place, and the one error that carries them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .errors import KeyedError, UserError
from .redact import redact

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and its line (from 1), or the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One mistake. `key` is dotted, with numbers for list items (`data.train.0.path`), and empty for the whole
    file; `remedy` says what to do and may be empty where the message already does."""

    key: str
    message: str
    remedy: str = ""
    origin: Origin | None = None

    def __str__(self) -> str:
        parts = [str(self.origin) if self.origin else "", self.key, self.message]
        line = ": ".join(part for part in parts if part)
        return f"{line}; {self.remedy}" if self.remedy else line

    def redacted(self, secrets: Sequence[str]) -> Problem:
        """The same problem without the values of secret variables."""
        return replace(self, message=redact(self.message, secrets), remedy=redact(self.remedy, secrets))


class RecipeError(UserError):
    """Every mistake of a recipe at once: `problems`, in the order of `path`'s lines, then of other places."""

    def __init__(self, path: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: _place(path, problem)))
        count = len(self.problems)
        heading = f"{path}: {count} problem{'s' if count > 1 else ''} in the recipe"
        super().__init__("\n".join([heading, *(f"  {problem}" for problem in self.problems)]))


def _place(path: str, problem: Problem) -> tuple[int, str, int]:
    origin = problem.origin or Origin(path)
    order = 0 if origin.file == path else 2 if origin.line is None else 1
    return order, origin.file, origin.line or 0


def located(error: Exception, origins: Mapping[str, Origin]) -> str:
    """An error's message; where it is about a key of the recipe, with the file and line that the key stands in."""
    key = error.key if isinstance(error, KeyedError) else ""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f"{origins[key]}: {error}" if key else str(error)


def dotted(parent: str, child: str | int) -> str:
    """The key of something within `parent`."""
    return f"{parent}.{child}" if parent else str(child)
