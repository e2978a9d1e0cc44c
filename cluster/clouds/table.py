"""The table of clouds: `cluster.provider` -> where its class is."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .base import Cloud

CLOUDS = {
    "aws": "aws:Aws",
    "gcp": "gcp:Gcp",
    "azure": "azure:Azure",
}


def cloud_of(provider: str) -> Cloud:
    """The provider of this name."""
    module, _, name = CLOUDS[provider].partition(":")
    found: Any = getattr(import_module(f".{module}", __package__), name)
    cloud: Cloud = found()
    return cloud


def image_of(image: str | dict[str, str], region: str) -> str:
    """That of a region."""
    return image[region] if isinstance(image, dict) else image
