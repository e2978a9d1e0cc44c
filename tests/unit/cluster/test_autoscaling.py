"""What an autoscaling cluster could have, and what is said when that is not enough. Real autoscaler: tests/cluster."""

from __future__ import annotations

import pytest

from ftlaunch.cluster import autoscaling
from ftlaunch.cluster.autoscaling import HEAD, NodeType, bundle_of, parse_config, refusal
from ftlaunch.cluster.base import Demand
from ftlaunch.recipes.errors import InfrastructureError

CONFIG = {
    "cluster_name": "lab",
    "max_workers": 6,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "node_config": {}},
        "gpu": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 4, "min_workers": 1},
        "cpu": {"resources": {"CPU": 16}},
        "huge": {"resources": {"CPU": 192, "GPU": 16}, "max_workers": 100},
    },
}


def test_kinds_of_nodes_and_how_many_there_can_be():
    assert parse_config(CONFIG) == [
        NodeType("gpu", {"CPU": 96.0, "GPU": 8.0}, 4),
        NodeType("cpu", {"CPU": 16.0}, 6),
        NodeType("huge", {"CPU": 192.0, "GPU": 16.0}, 6),
    ]
    assert parse_config({"cluster_name": "none"}) == []


def test_what_one_node_must_have():
    assert bundle_of(Demand(nodes=2, ranks=16, uses_gpus=True, cpus_per_rank=12)) == {"CPU": 96, "GPU": 8}
    assert bundle_of(Demand(nodes=3, ranks=3, uses_gpus=False, cpus_per_rank=1)) == {"CPU": 1}


def test_what_can_never_be_there_is_refused_with_what_is_offered():
    types = parse_config(CONFIG)
    head = {"CPU": 4.0, HEAD: 1.0}
    assert refusal({"CPU": 96, "GPU": 8}, 4, [head], types) is None
    assert refusal({"CPU": 8}, 6, [head], types) is None
    said = refusal({"CPU": 200, "GPU": 8}, 2, [head], types)
    assert said is not None
    assert "2 nodes with 8 GPUs and 200 cores are asked for, and the Ray cluster can have 0" in said
    assert "gpu (8 GPUs and 96 cores, at most 4)" in said
    said = refusal({"CPU": 16, "GPU": 8}, 20, [head, {"CPU": 96.0, "GPU": 8.0}], types)
    assert said is not None and "can have 10" in said
    assert refusal({"CPU": 2}, 17, [head], types) is None  # the head is one of them
    assert refusal({"CPU": 2}, 18, [head], types) is not None
    assert refusal({"CPU": 1}, 9, [head], None) is None  # not known


def test_the_wait_tells_how_far_it_is_and_has_an_end(monkeypatch):
    up = [{"CPU": 1.0}]
    monkeypatch.setattr(autoscaling, "_alive", lambda: list(up))
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 20.0
        if now[0] == 60.0:
            up.append({"CPU": 2.0})

    monkeypatch.setattr(autoscaling.time, "sleep", sleep)
    said: list[str] = []
    with pytest.raises(InfrastructureError, match="2 of 3 nodes with 0 GPUs and 1 cores are up after 3 minutes"):
        autoscaling._wait({"CPU": 1}, 3, 180.0, said.append, clock=lambda: now[0])
    assert [line.split(": ")[1][:6] for line in said][:3] == ["1 of 3", "1 of 3", "2 of 3"]
    up.append({"CPU": 1.0})
    autoscaling._wait({"CPU": 1}, 3, 180.0, said.append, clock=lambda: now[0])
