"""Hosts for the tests of this folder, made once for a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ssh_hosts import Hosts, ssh_hosts


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """alpha, beta and gamma."""
    with ssh_hosts("alpha", "beta", "gamma") as made:
        yield made
