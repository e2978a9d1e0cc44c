"""The code, for the workers of a cluster that does not have ftlaunch installed.

It is built from the package's own list of files: shipping a folder would take along whatever lies in it, and a
folder named `distributed` on a worker's path would hide other packages of that name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..cluster.base import Cluster

NAME = "ftlaunch"
FOLDERS = ("cluster", "distributed", "launcher", "recipes")
SUFFIXES = (".py", ".yaml", ".json", ".j2")


def package_files() -> dict[str, bytes]:
    """The package's files by their path below `ftlaunch/`, sorted."""
    root = Path(__file__).resolve().parent.parent
    found = [root / "__init__.py", *(path for folder in FOLDERS for path in _below(root / folder))]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(found)}


def _below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())


def write_package(folder: Path) -> Path:
    """Write the files to FOLDER/ftlaunch and return that path; Ray ships folders by content, so that a second run of
    the same code ships nothing."""
    root = folder / NAME
    for name, content in package_files().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    """Ray up and this process connected to it, with workers that can import ftlaunch; in the end, what was started for
    that is ended."""
    with tempfile.TemporaryDirectory(prefix="ftlaunch-code-") as folder:
        try:
            cluster.up(lambda: write_package(Path(folder)))
            yield
        finally:
            cluster.down()
