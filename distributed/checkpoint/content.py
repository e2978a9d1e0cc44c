"""What one checkpoint holds, before anything of it is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .parts import Source


@dataclass(frozen=True)
class Content:
    """What one checkpoint holds.

    `parts`: stem ("model" or "adapter_model", "master", "exp_avg", ...) -> its fragments. `extra_files`: path ->
    content, for rank 0 to write (config.json, tokenizer). `state`: what resuming needs besides tensors, as JSON;
    the same on every rank. `frozen`: names of tensors that did not change since the run began. `copied`: the parts are
    copies of just what this rank supplies.
    """

    parts: Mapping[str, Source]
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    frozen: Collection[str] = ()
    copied: bool = False
