"""What hosts say of themselves, judged: every rule on hosts that break it and on hosts that do not."""

from __future__ import annotations

from typing import Any

import pytest
from packaging.requirements import Requirement

from ftlaunch.cluster import ssh_facts
from ftlaunch.cluster.ssh_facts import Facts
from ftlaunch.recipes.schema_cluster import SshCluster

WANTED = {name: Requirement(text) for name, text in {"ray": "ray[train]>=2.60,<2.61", "torch": "torch>=2.11"}.items()}
PACKAGES = {"ray": "2.60.0", "torch": "2.13.0+cpu", "numpy": "2.1.0"}


def host(name: str, ahead_s: float = 0.0, **changes: Any) -> Facts:
    said = {
        "boot": f"boot of {name}", "system": "Linux", "python": "3.11.7", "executable": "/opt/venv/bin/python",
        "gpus": 8, "packages": PACKAGES, "free_bytes": 1 << 40, "scratch": "/tmp/ft-1",
    }  # fmt: skip
    return Facts(said | changes, ahead_s)


def said(*facts: Facts, **config: Any) -> list[str]:
    names = [f"h{number}" for number in range(len(facts))]
    cluster = SshCluster.model_validate({"type": "ssh", "hosts": names, **config})
    return ssh_facts.problems(cluster, dict(zip(names, facts, strict=True)), WANTED)


def test_good_hosts_have_no_problem():
    assert said(host("a"), host("b", ahead_s=4.0), host("c", ahead_s=-4.0)) == []
    assert said(host("a", gpus=0), host("b", gpus=0)) == []
    assert said(host("a", gpus=0), host("b", gpus=2), gpus_per_node=0) == []


@pytest.mark.parametrize(
    ("changes", "config", "parts"),
    [
        ({"system": "Darwin"}, {}, ["host h1: it runs Darwin; nodes must run Linux"]),
        ({"python": "3.10.2"}, {}, ["Python 3.10.2; ftlaunch needs 3.11", "Python is 3.11.7 on h0, 3.10.2 on h1"]),
        (
            {"packages": PACKAGES | {"ray": "2.59.1", "torch": None}},
            {},
            ["host h1: ftlaunch needs ray<2.61,>=2.60 (2.59.1), torch>=2.11 (not there); there: /opt/venv/bin/python "
             "-m pip install 'ray[train]<2.61,>=2.60' 'torch>=2.11'", "hosts differ: ray"],
        ),
        ({"packages": PACKAGES | {"numpy": "2.0.0"}}, {}, ["hosts differ: numpy is 2.1.0 on h0, 2.0.0 on h1"]),
        ({"gpus": 3}, {"gpus_per_node": 8}, ["host h1: cluster.gpus_per_node is 8, it has 3"]),
        ({"gpus": 3}, {}, ["host h1: it has 3 GPUs, others have 8; say cluster.gpus_per_node"]),
        ({"free_bytes": 10**9}, {}, ["host h1: 1.0 GB are free at /tmp/ft-1, 2.1 GB are needed"]),
        ({"boot": "boot of a"}, {}, ["cluster.hosts: h0 and h1 are the same machine"]),
        ({"ahead_s": -60.0}, {}, ["host h1: its clock is -60 s off the others'"]),
    ],
)  # fmt: skip
def test_each_rule_names_the_host(changes, config, parts):
    found = said(host("a"), host("b", **changes), **config)
    assert len(found) == len(parts)
    for part, problem in zip(parts, found, strict=True):
        assert part in problem


def test_everything_is_said_at_once():
    bad = host("b", ahead_s=99.0, gpus=0, python="3.8.1", free_bytes=0, packages={})
    assert len(said(host("a"), bad, gpus_per_node=4)) == 6


def test_our_own_requirements_are_known():
    wanted = ssh_facts.requirements()
    assert {"torch", "ray", "transformers", "psutil"} <= set(wanted)
    assert "moto" not in wanted  # an extra's
    assert wanted["ray"].specifier.contains("2.60.0")
