"""Numerics are compared in this process: a world of one, so that an oracle can be called beside the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from one_rank import alone

from ftlaunch.distributed.group import Group


@pytest.fixture
def group() -> Iterator[Group]:
    """The process group of one rank."""
    with alone() as made:
        yield made
