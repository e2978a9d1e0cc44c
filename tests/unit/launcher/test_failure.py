"""What became of a run, from the words that real failures leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftlaunch.launcher.failure import ECHO, Trouble, cause, classify

TEXTS: list[tuple[str, str, str]] = [
    tuple(one) for one in json.loads(Path(__file__).with_name("error_texts.json").read_text())
]
"""(kind, type of the exception, its text), from issues, logs and trials."""

STOPS = {"mistake": 1, "gpu memory": 1, "driver": 1, "assertion": 2, "bug": 2, "room": 2}
"""Kind -> exit code."""

RESPONSES = {
    **{kind: ("stop", code) for kind, code in STOPS.items()},
    **dict.fromkeys(("resize", "preempted"), ("moved", 2)),
    **dict.fromkeys(("gpu", "host memory", "disk", "hang"), ("elsewhere", 2)),
    **dict.fromkeys(("node", "killed", "collective", ECHO, "network", "storage", "start", "unknown"), ("again", 2)),
}


@pytest.mark.parametrize(("kind", "type_", "text"), TEXTS)
def test_real_texts(kind, type_, text):
    failure = classify(Trouble(type_, text), 1, "beta")
    assert failure.kind == kind
    assert (failure.response, failure.exit_code) == RESPONSES[kind]
    assert failure.counts == (failure.response in ("again", "elsewhere"))
    assert failure.detail == text.strip()
    assert str(failure).startswith("rank 1 on beta: ") == (failure.response != "moved")


def test_every_kind_has_a_text():
    assert {kind for kind, _, _ in TEXTS} == set(RESPONSES)


def test_the_words_for_people():
    vanished = next(text for kind, _, text in TEXTS if kind == "killed")
    assert "OOM killer" in vanished  # Ray names it for whatever vanishes
    assert classify(Trouble("ActorDiedError", vanished)).says == "the process was killed"
    full = classify(Trouble("OSError", "while writing\n[Errno 28] No space left on device: '/scratch'\nbye"))
    assert full.says == "a disk of the node is full ([Errno 28] No space left on device: '/scratch')"
    assert classify(Trouble("UserError", "lower it")).says == "lower it"
    bug = classify(Trouble("KeyError", "'x'"))
    assert bug.says == "a bug in ftlaunch; please report it: KeyError: 'x'"


def of(kind: str, rank: int):
    type_, text = next((type_, text) for known, type_, text in TEXTS if known == kind)
    return classify(Trouble(type_, text), rank)


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ([ECHO, "killed", ECHO], ("killed", 1)),
        ([ECHO, ECHO], (ECHO, 0)),
        (["killed", ECHO, "mistake"], ("mistake", 2)),
        (["killed", "killed"], ("killed", 0)),
        (["killed", "gpu"], ("gpu", 1)),
        (["node", "resize"], ("resize", 1)),
    ],
)
def test_the_cause_among_what_ranks_died_of(kinds, found):
    failure = cause({rank: of(kind, rank) for rank, kind in enumerate(kinds)})
    assert (failure.kind, failure.rank) == found
