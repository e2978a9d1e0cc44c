"""Stands in for torchvision: MosaicML Streaming imports it for image datasets, which no text reader touches, and its
wheels want a torch with CUDA."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class VisionDataset:
    """Never made."""


for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__spec__ = ModuleSpec(name, None)
sys.modules["torchvision.datasets"].VisionDataset = VisionDataset  # type: ignore[attr-defined]
sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
