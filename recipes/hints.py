"""What an unknown key was probably meant to be: a misspelling, a key of another section, or another tool's name."""

from __future__ import annotations

import difflib

from .foreign_names import FOREIGN_NAMES
from .json_schema import all_places
from .problems import dotted

_MANY = 3


def hint(name: str, section: str, siblings: tuple[str, ...]) -> str:
    """One sentence for an unknown key `name` in the dotted `section`, whose keys are `siblings`; empty when nothing
    resembles it."""
    return (
        _elsewhere(name, section)
        or _foreign(name)
        or _misspelt(name, siblings)
        or _misspelt_elsewhere(name)
        or _foreign_misspelt(name)
    )


def _elsewhere(name: str, section: str) -> str:
    places = [place for place in all_places() if name in place.properties]
    here = [place.tag for place in places if place.key == section]
    if here:
        return f"{name} belongs to {section} of type {' or '.join(here)}"
    if not places or len(places) > _MANY:
        return ""
    where = " or ".join(str(place) or "the top level" for place in places)
    return f"{name} belongs under {where}" if where != "the top level" else f"{name} belongs at the top level"


def _foreign(name: str) -> str:
    if name.lower() not in FOREIGN_NAMES:
        return ""
    target, note = FOREIGN_NAMES[name.lower()]
    return f"here that is {target}: {note}" if target else note


def _misspelt(name: str, siblings: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else ""


def _misspelt_elsewhere(name: str) -> str:
    targets = {key: dotted(str(place.key), key) for place in reversed(all_places()) for key in place.properties}
    close = difflib.get_close_matches(name, targets, n=1, cutoff=0.8)
    return f"did you mean {targets[close[0]]}?" if close else ""


def _foreign_misspelt(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), FOREIGN_NAMES, n=1, cutoff=0.85)
    return _foreign(close[0]) if close else ""
