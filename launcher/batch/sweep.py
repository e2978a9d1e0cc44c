"""`--sweep train.learning_rate=1e-5,2e-5`: every combination of some values, and a name for each. Pure."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_NAME = 80
"""Of a run."""

PLAIN = re.compile(r"[A-Za-z0-9._]+|-?[0-9.]+(?:[eE]-?[0-9]+)?")

PAIRS = {"]": "[", "}": "{", ")": "("}
QUOTES = "\"'"


class Sweep(NamedTuple):
    """A dotted key, and the YAML texts of the values that it takes in turn."""

    key: str
    values: tuple[str, ...]


Settings = tuple[tuple[str, str], ...]
"""(key, value) of every sweep, for one run."""


def parse_sweeps(texts: Sequence[str], problems: list[str]) -> list[Sweep]:
    """The sweeps of a command line; what is wrong with others is added to `problems`."""
    sweeps: list[Sweep] = []
    for text in texts:
        key, equals, rest = text.partition("=")
        values = split_values(rest)
        if not equals or not all(key.split(".")):
            problems.append(f"--sweep {text}: write key.sub=value,value,…")
        elif key == "name":
            problems.append(f"--sweep {text}: runs of a sweep get their names from its values")
        elif key in {sweep.key for sweep in sweeps}:
            problems.append(f"--sweep {text}: {key} is swept twice; name all its values at once")
        elif not all(values):
            problems.append(f"--sweep {text}: a value is empty; write null, or '' in quotes")
        elif len(set(values)) < len(values):
            problems.append(f"--sweep {text}: a value stands there twice")
        else:
            sweeps.append(Sweep(key, values))
    return sweeps


def split_values(text: str) -> tuple[str, ...]:
    """Cut at commas that stand in no brackets and no quotes."""
    parts, quote = [""], ""
    open_brackets: list[str] = []
    for letter in text:
        if letter == "," and not open_brackets and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES:
            quote = letter
        elif letter in PAIRS.values():
            open_brackets.append(letter)
        elif letter in PAIRS and open_brackets and open_brackets[-1] == PAIRS[letter]:
            open_brackets.pop()
    return tuple(part.strip() for part in parts)


def combinations(sweeps: Sequence[Sweep]) -> list[Settings]:
    """Every combination, the last sweep's values going round first; one without settings where nothing is swept."""
    choices = [[(sweep.key, value) for value in sweep.values] for sweep in sweeps]
    return [tuple(chosen) for chosen in itertools.product(*choices)]


def member_name(base: str, settings: Settings) -> str:
    """`bot-learning_rate-1e-5-rank-8`: the same for the same settings at any time, so that a batch that is run again
    finds its runs. What a name cannot hold is told apart by a digest."""
    if not settings:
        return base
    said = "-".join(f"{key.rpartition('.')[2]}-{_plain(value)}" for key, value in settings)
    name = f"{base}-{said}"
    if len(name) <= MAX_NAME and all(_plain(value) == value for _, value in settings):
        return name
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=4).hexdigest()
    return f"{name[: MAX_NAME - 9].rstrip('-._')}-{digest}"


def _plain(value: str) -> str:
    """What a name can hold of it; the same if that is all. A dash within a word would look like the next key."""
    return value if PLAIN.fullmatch(value) else re.sub(r"[^A-Za-z0-9._]+", "-", value).strip("-")
