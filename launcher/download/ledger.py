"""What a folder of downloads holds: which file of where, whole."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

NAME = "downloads.json"
UNFINISHED = ".unfinished"


class Downloads:
    """Files below `folder` by place, with where they are from. What is written there under its own name is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / NAME
        self._lock = threading.Lock()
        stored = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._files: dict[str, dict[str, Any]] = stored.get("files", {})
        self._models: dict[str, dict[str, Any]] = stored.get("models", {})

    def has(self, place: str, etag: str, size: int) -> bool:
        """Whether this very file is there."""
        known = self._files.get(place)
        if known is None or known["etag"] != etag or known["size"] != size:
            return False
        path = self.folder / place
        return path.is_file() and path.stat().st_size == size

    def unfinished(self, place: str) -> Path:
        """Where to write it; its folder is there."""
        path = self.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(path.name + UNFINISHED)

    def add(self, place: str, url: str, etag: str, size: int) -> None:
        """It is written whole: it gets its name, and is remembered."""
        self.unfinished(place).replace(self.folder / place)
        with self._lock:
            self._files[place] = {"url": url, "etag": etag, "size": size}
            self._store()

    def model(self, place: str, *, weights: bool) -> list[int] | None:
        """Sizes of the files of a model that is there whole; None for one that is not."""
        known = self._models.get(place)
        if known is None or (weights and not known["weights"]):
            return None
        files = {name: self._files[name] for name in known["files"]}
        whole = all(self.has(name, file["etag"], file["size"]) for name, file in files.items())
        return [int(file["size"]) for file in files.values()] if whole else None

    def add_model(self, place: str, names: list[str], *, weights: bool) -> None:
        """All files of a model are there, below its place."""
        self._models[place] = {"files": [f"{place}/{name}" for name in names], "weights": weights}
        self._store()

    def _store(self) -> None:
        new = self._path.with_name(f"{NAME}{UNFINISHED}")
        new.write_text(json.dumps({"files": self._files, "models": self._models}, indent=1, sort_keys=True) + "\n")
        new.replace(self._path)
