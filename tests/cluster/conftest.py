"""Hosts for the tests of this folder, made once for a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cloud_site import CloudSite, cloud_site
from slurm_site import Site, slurm_site
from ssh_hosts import Hosts, ssh_hosts


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """alpha, beta and gamma."""
    with ssh_hosts("alpha", "beta", "gamma") as made:
        yield made


@pytest.fixture(scope="session")
def slurm() -> Iterator[Site]:
    """Nodes n1, n2 and n3."""
    with slurm_site("n1", "n2", "n3") as site:
        yield site


@pytest.fixture(scope="session")
def cloud(tmp_path_factory) -> Iterator[CloudSite]:
    """An EC2 whose machines are hosts on this one."""
    with cloud_site(tmp_path_factory.mktemp("cloud")) as site:
        yield site
