"""The code as one archive, for the workers of a cluster that does not have ftlaunch installed.

It is built from the package's own list of files: shipping a folder would take along whatever lies in it, and a
folder named `distributed` on a worker's path would hide other packages of that name.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

NAME = "ftlaunch"
FOLDERS = ("cluster", "distributed", "launcher", "recipes")
SUFFIXES = (".py", ".yaml", ".json", ".j2")
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The oldest time a zip can say; with real times the same code would have many hashes."""


def package_files() -> dict[str, bytes]:
    """The package's files by their path below `ftlaunch/`, sorted."""
    root = Path(__file__).resolve().parent.parent
    found = [root / "__init__.py", *(path for folder in FOLDERS for path in _below(root / folder))]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(found)}


def _below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())


def content_hash(files: dict[str, bytes]) -> str:
    """A hash of names and contents; equal code has equal hashes on every machine."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def build_archive(folder: Path) -> Path:
    """Write `ftlaunch-HASH.zip` into `folder` and return its path; what is there already is kept, since the name
    says what is in it. On a worker's import path it makes `import ftlaunch` work."""
    files = package_files()
    path = folder / f"{NAME}-{content_hash(files)}.zip"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(f"{NAME}/{name}", EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    unfinished.replace(path)
    return path
