"""What a long proof has shown so far, in a file, so that it may be interrupted and goes on where it was.

PORTION_MINUTES: after so many minutes a proof stops by itself, between two of its pieces; the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PRODUCT = ("recipes", "distributed")
"""What the proofs are about: with other code in here they begin anew."""


def commit() -> str:
    """The commit that a result is of."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Of the product's code, and of what a proof was asked for."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class Ledger:
    """Pieces of a proof by name, each a JSON value. `settings`: what they depend on besides the code (seed, sizes)."""

    def __init__(self, proof: str, **settings: Any) -> None:
        self._path = ROOT / "build" / "evidence" / f"{proof}.json"
        self._key = fingerprint(settings)
        self._late_at = time.monotonic() + 60 * float(os.environ.get("PORTION_MINUTES", "inf"))
        stored = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.pieces: dict[str, Any] = stored["pieces"] if stored.get("key") == self._key else {}

    def pause_if_late(self, pieces: int) -> None:
        """Ends this portion when its time is over; `pieces` is how many there are to be."""
        if time.monotonic() > self._late_at:
            pytest.skip(f"{len(self.pieces)} of {pieces} are done; the same command goes on")

    def add(self, pieces: Mapping[str, Any]) -> None:
        """Keep what has been shown."""
        self.pieces |= pieces
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps({"key": self._key, "pieces": self.pieces}))
        beside.replace(self._path)

    def close(self) -> None:
        """The proof is complete and written down elsewhere."""
        self._path.unlink(missing_ok=True)
