"""The table of training methods: `method.type` -> where its class is."""

from __future__ import annotations

from importlib import import_module

from ..schema import MethodConfig
from .base import Method

METHODS = {
    "sft": "sft:Sft",
    "cpt": "cpt:Cpt",
}


def build_method(config: MethodConfig) -> Method:
    """The method that a recipe asks for."""
    module, _, name = METHODS[config.type].partition(":")
    method: Method = getattr(import_module(f".{module}", __package__), name)(config)
    return method
