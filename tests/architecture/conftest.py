"""The product's source, parsed once, for tests that look at its shape."""

from __future__ import annotations

import ast
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HOUSES = ("recipes", "distributed", "cluster", "launcher")


@dataclass(frozen=True)
class Source:
    """One file of the product. `name` is its path from the root; `module` what Python imports it as."""

    path: Path
    name: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        parts = ("ftlaunch", *Path(self.name).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sources(root: Path) -> list[Source]:
    paths = [root / "__init__.py", *(path for house in HOUSES for path in sorted((root / house).rglob("*.py")))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    return [Source(path, str(path.relative_to(root)), text, ast.parse(text)) for path, text in texts.items()]


@pytest.fixture(scope="session")
def files(root: Path) -> list[str]:
    """Files that are committed or about to be, as paths from the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in listed if name and (root / name).is_file()})
