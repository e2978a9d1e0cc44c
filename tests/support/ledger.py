"""What a long proof has shown so far, in a folder, so that it may be interrupted and goes on where it was, and so that
several processes may share its work.

PORTION_MINUTES: after so many minutes a proof stops by itself, between two of its pieces; the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
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
        self._folder = ROOT / "build" / "evidence" / f"{proof}-{fingerprint(settings)[:16]}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._late_at = time.monotonic() + 60 * float(os.environ.get("PORTION_MINUTES", "inf"))

    @property
    def pieces(self) -> dict[str, Any]:
        """Those that are done, by whomever."""
        return {path.stem: json.loads(path.read_text()) for path in self._folder.glob("*.json")}

    def begin(self, name: str) -> bool:
        """False where it is done, or another process is at it. Ends this portion when its time is over."""
        if (self._folder / f"{name}.json").exists():
            return False
        claim = self._folder / f"{name}.claim"
        if claim.exists() and (other := int(claim.read_text() or 0)) != os.getpid() and psutil.pid_exists(other):
            return False
        self.pause(only_if_late=True)
        claim.write_text(str(os.getpid()))
        return True

    def add(self, pieces: Mapping[str, Any]) -> None:
        """Keep what has been shown."""
        for name, piece in pieces.items():
            beside = self._folder / f"{name}.new"
            beside.write_text(json.dumps(piece))
            beside.replace(self._folder / f"{name}.json")

    def pause(self, *, only_if_late: bool = False) -> None:
        """Ends this portion."""
        if not only_if_late or time.monotonic() > self._late_at:
            pytest.skip(f"{len(self.pieces)} pieces are done; the same command goes on")

    def close(self) -> None:
        """The proof is complete and written down elsewhere."""
        shutil.rmtree(self._folder)
