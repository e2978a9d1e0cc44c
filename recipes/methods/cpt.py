"""Continued pretraining: cross-entropy on every token of raw text."""

from __future__ import annotations

from ..schema import Cpt as CptConfig
from ..schema import Sft as SftConfig
from .sft import Sft


class Cpt(Sft):
    """The `cpt` method: `sft` with everything supervised."""

    name = "cpt"

    def __init__(self, _config: CptConfig) -> None:
        super().__init__(SftConfig(train_on="all"))
