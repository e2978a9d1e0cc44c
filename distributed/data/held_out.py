"""Which rows are held out for evaluation: a property of the row itself, the same for ever."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .columnar import without_nulls


def row_hash(row: Mapping[str, Any]) -> int:
    """64 bits of the row's canonical JSON: standard column names, sorted keys, nulls left out, so that the same row in
    parquet and in JSON lines has the same one."""
    kept = {name: without_nulls(value) for name, value in row.items() if value is not None}
    canonical = json.dumps(kept, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    digest = hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def held_out(row: Mapping[str, Any], fraction: float) -> bool:
    """True for about `fraction` of all rows, by their hash. No seed: equal rows are never on both sides, whatever else
    changes."""
    return row_hash(row) < fraction * 2**64
