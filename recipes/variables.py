"""`${VAR}` and `${VAR:-default}` in the text of a recipe; `$${` stands for a literal `${`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Substituted:
    """A text with its variables filled in; `unset` names those without a value, `secrets` are the values of those
    whose name looks secret."""

    text: str
    unset: tuple[str, ...]
    secrets: tuple[str, ...]


def substitute(text: str, environ: Mapping[str, str]) -> Substituted:
    """Fill in variables. As in a shell, `:-` also replaces an empty value."""
    unset: list[str] = []
    secrets: list[str] = []

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if name is None:
            return "${"
        found = environ.get(name)
        if default is not None and not found:
            return default
        if found is None:
            unset.append(name)
            return ""
        if found and _SECRET_NAME.search(name):
            secrets.append(found)
        return found

    return Substituted(_VARIABLE.sub(value, text), tuple(unset), tuple(secrets))
