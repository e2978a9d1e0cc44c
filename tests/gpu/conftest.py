"""Everything here needs a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_rank import CUDA

from ftlaunch.distributed import group as groups
from ftlaunch.distributed.group import Group


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them all."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _a_device() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


@pytest.fixture
def cuda_group() -> Iterator[Group]:
    """The process groups of a world of one GPU."""
    group = groups.start(CUDA, "")
    yield group
    groups.stop()
