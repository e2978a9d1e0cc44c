"""Nodes that are there: what Ray lists, held against what answers."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from ftlaunch.launcher import live_nodes
from ftlaunch.launcher.live_nodes import Names, Node, absent, parse_nodes


def row(key: str, host: str, port: int = 7000, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {
        "NodeID": key * 8, "Alive": alive, "NodeManagerHostname": host, "NodeManagerAddress": "127.0.0.1",
        "NodeManagerPort": port, "Resources": resources,
    }  # fmt: skip


def test_dead_nodes_are_left_out_and_names_are_unique():
    names = Names()
    rows = [row("a", "alpha", CPU=2.0), row("b", "beta"), row("c", "beta"), row("d", "gamma", alive=False)]
    assert [node.name for node in parse_nodes(rows, names)] == ["alpha", "beta (bbbbbb)", "beta (cccccc)"]
    rows[2]["Alive"] = False
    assert [node.name for node in parse_nodes(rows, names)] == ["alpha", "beta (bbbbbb)"]  # a node keeps its name
    later = [row("a", "alpha", alive=False), row("e", "alpha")]
    assert [node.name for node in parse_nodes(later, names)] == ["alpha"]
    assert names["d" * 8] == "gamma"
    assert names["unknown-node"] == "unknow"


@pytest.mark.parametrize(
    ("has", "each", "room"),
    [
        ({"CPU": 8.0, "GPU": 4.0}, {"CPU": 1, "GPU": 1}, 4),
        ({"CPU": 7.0, "GPU": 4.0}, {"CPU": 2, "GPU": 1}, 3),
        ({"CPU": 8.0}, {"CPU": 1, "GPU": 1}, 0),
        ({"CPU": 8.0}, {"CPU": 3}, 2),
    ],
)
def test_room(has, each, room):
    assert Node("a", "alpha", ("127.0.0.1", 1), has).room(each) == room


def test_who_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = [there.getsockname()[1], gone.getsockname()[1]]
        gone.close()
        nodes = parse_nodes([row("a", "alpha", ports[0]), row("b", "beta", ports[1])], Names())
        assert absent(nodes) == {"b" * 8: "ended"}
        monkeypatch.setattr(live_nodes.socket, "create_connection", silent)
        assert absent(nodes) == {"a" * 8: "silent", "b" * 8: "silent"}
    assert absent([]) == {}


def silent(*_: object, **__: object) -> None:
    """As of a machine that has lost its power."""
    raise TimeoutError
