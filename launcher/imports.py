"""Slow imports, made a little quicker."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from importlib import import_module


def import_all(modules: Iterable[str]) -> None:
    """Import modules without looking for garbage meanwhile: what they make stays, and walking through it over and over
    takes a quarter of the time of importing torch and transformers. Later collections leave it alone too."""
    gc.disable()
    try:
        for module in modules:
            import_module(module)
    finally:
        gc.freeze()
        gc.enable()
