"""Which nodes of a running Ray cluster ranks can run on."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from ftlaunch.cluster import autoscaling, existing
from ftlaunch.launcher.hardware import Machine
from ftlaunch.launcher.supervisor import find_demand
from ftlaunch.recipes.errors import UserError
from ftlaunch.recipes.schema_cluster import RayCluster

HEAD = {"CPU": 8.0}
BARE_HEAD = {"memory": 1e9}
GPUS = {"CPU": 64.0, "GPU": 8.0}
FEW_GPUS = {"CPU": 32.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "gpus_per_node", "found"),
    [
        ([HEAD, GPUS, GPUS], None, [GPUS, GPUS]),
        ([BARE_HEAD, GPUS], None, [GPUS]),
        ([HEAD, FEW_GPUS, GPUS], 8, [GPUS]),
        ([HEAD, FEW_GPUS, GPUS], None, [FEW_GPUS, GPUS]),
        ([HEAD, GPUS], 0, [HEAD, GPUS]),
        ([BARE_HEAD, HEAD], None, [HEAD]),
        ([HEAD], 8, []),
    ],
)
def test_nodes_for_ranks(nodes, gpus_per_node, found):
    assert existing.nodes_for_ranks(nodes, gpus_per_node) == found


def demand(monkeypatch, has, **settings):
    """What a run asks of a cluster of these nodes."""
    monkeypatch.setattr(existing, "connect", lambda address, runtime_env: address)
    monkeypatch.setattr(existing, "_alive_nodes", lambda: has)
    monkeypatch.setattr(autoscaling, "node_types", lambda: None)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(shutdown=lambda: None))
    return find_demand(RayCluster(type="ray", **settings), Machine(cores=2))


def test_a_head_without_gpus_does_not_put_ranks_on_cores(monkeypatch):
    found = demand(monkeypatch, [HEAD, GPUS, GPUS], nodes=2)
    assert (found.ranks, found.uses_gpus, found.cpus_per_rank) == (16, True, 8)
    assert demand(monkeypatch, [HEAD, GPUS, GPUS], nodes=2, gpus_per_node=8) == found


def test_no_node_of_the_kind(monkeypatch):
    with pytest.raises(UserError, match=r"cluster.gpus_per_node: no node .* has 8 GPUs; they have 0 GPUs and 8 cores"):
        demand(monkeypatch, [HEAD], gpus_per_node=8)
