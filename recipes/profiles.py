"""Cluster profiles: `cluster: NAME` reads `clusters/NAME.yaml`, so that a recipe is the same file everywhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from .document import Document, read_document
from .problems import Origin, Problem

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def profile_folders(recipe: Path, environ: Mapping[str, str]) -> tuple[Path, Path]:
    """Where profiles are looked for, first hit wins: beside the recipe, then in the user's configuration."""
    configuration = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".config"
    return recipe.parent / "clusters", Path(configuration) / "ftlaunch" / "clusters"


def read_profile(name: str, recipe: Path, environ: Mapping[str, str]) -> Document:
    """The `cluster` section that a profile holds, keys beginning with `cluster.`; or a document of problems
    (without origins: the caller knows where the name was written)."""
    folders = profile_folders(recipe, environ)
    files = [folder / f"{name}.yaml" for folder in folders] if _NAME.fullmatch(name) else []
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return Document(problems=[_unknown(name, folders)])
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return Document(problems=[Problem("cluster", f"cannot read the profile {file}: {error}")])
    return read_document(text, Origin(str(file), 1), environ=environ, root="cluster")


def _unknown(name: str, folders: tuple[Path, ...]) -> Problem:
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    where = " and ".join(str(folder) for folder in folders)
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    there_are = f"there are: {', '.join(known)}" if known else "there are none"
    message = f"unknown cluster profile {name!r} (looked in {where})"
    return Problem("cluster", message, f"{meant}{there_are}; without a profile write cluster: {{type: …}}")
