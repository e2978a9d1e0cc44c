"""Runs with three random faults each end by themselves, with the weights of an undisturbed run, and all rows once.

`make evidence NAME=chaos` runs twenty of them: on this machine, on hosts over SSH, and on this machine with data and
run directory in an object store. The quick tier has most of these faults too, three to a run and not drawn:
`test_failures.py`, `test_ssh_failures.py`.

CHAOS_RUNS: only the first ones. PORTION_MINUTES: see `support/ledger.py`. A run that is done is not done again.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chaos import Bed, Local, Stored, compare, disturb, over_ssh, recipe
from chaos_store import store_with_a_door
from ledger import RESULTS, Ledger, commit
from slow_steps import slow_steps
from ssh_hosts import Hosts
from training import train

STEPS = 40
STEP_S = 0.2
FAULTS = 3
SEED = 21
"""The first from 20 on whose plans have every fault at every place."""
PLANNED = 20
RUNS = int(os.environ.get("CHAOS_RUNS", PLANNED))
LOCAL = ("worker SIGKILL", "worker SIGSTOP", "slow rank", "driver SIGKILL", "raylet SIGKILL", "head SIGKILL")
SSH = (*LOCAL, "host cut off", "disk full")
STORED = (*LOCAL, "store down", "store silent")
PLACES = (("local", LOCAL), ("ssh", SSH), ("s3", STORED))


def plan_of(number: int) -> tuple[str, list[tuple[int, str]]]:
    """Where run `number` is, and what happens to it behind which steps."""
    rng = random.Random(f"{SEED} {number}")
    kind, faults = PLACES[number % len(PLACES)]
    steps = sorted(rng.sample(range(2, STEPS - 10), FAULTS))
    return kind, [(step, rng.choice(faults)) for step in steps]


@contextmanager
def bed_of(kind: str, folder: Path, hosts: Hosts) -> Iterator[Bed]:
    """Where a run of a kind goes. `folder` is this process's."""
    slow = slow_steps(folder, STEP_S, os.environ.get("PYTHONPATH", ""))
    if kind == "ssh":
        with over_ssh(hosts, hosts.folder / "chaos") as bed:
            yield bed
    elif kind == "s3":
        with store_with_a_door(folder) as store:
            yield Stored(folder, slow | store.variables, store=store)
    else:
        yield Local(folder, slow)


def show(bed: Bed, number: int, undisturbed: Any) -> dict[str, Any]:
    kind, plan = plan_of(number)
    outcome = disturb(bed, f"chaos-{number}", STEPS, plan)
    if outcome.code != 0:
        return {"run": number, "place": kind, "faults": plan, "exit_code": outcome.code, "text": outcome.text[-4000:]}
    return {"run": number, "place": kind, "faults": plan, **compare(outcome, undisturbed, STEPS, bed.world)}


def is_right(piece: Mapping[str, Any]) -> bool:
    """Bitwise where every step ran at the first world size, to rounding otherwise."""
    if piece["exit_code"] != 0 or piece["happened"] < FAULTS or not piece["steps"] or not piece["rows"]:
        return False
    return bool(piece["bitwise"] if piece["same_world"] else piece["largest_difference"] <= 1e-5)


def table(result: Mapping[str, Any]) -> str:
    """For people."""
    right = f"{result['right']} of {result['run']} ({result['planned']} planned) right"
    lines = [
        "# chaos",
        "Runs of 40 steps with three random faults each, held against an undisturbed run: do they end by themselves, "
        "with its weights, every row once?",
        f"`{result['command']}` at {result['commit'][:12]}, seed {result['seed']}: {right}.",
        "| run | place | faults (behind step) | restarts | ranks of each start | weights | steps and rows |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(map(row, result["runs"])),
    ]  # fmt: skip
    return "\n\n".join(lines) + "\n"


def row(piece: Mapping[str, Any]) -> str:
    faults = ", ".join(f"{fault} ({step})" for step, fault in piece["faults"])
    place = f"| {piece['run']} | {piece['place']} | {faults} "
    if piece["exit_code"] != 0:
        return f"{place}| | | exit code {piece['exit_code']} | |"
    restarts = ", ".join(failure["kind"] for failure in piece["failures"]) or "none"
    worlds = ", ".join(map(str, piece["worlds"]))
    weights = "bitwise" if piece["bitwise"] else f"within {piece['largest_difference']:.1e}"
    once = "each once" if piece["steps"] and piece["rows"] else "WRONG"
    if piece["happened"] < FAULTS:
        once += f", but only {piece['happened']} faults happened before its end"
    return f"{place}| {restarts} | {worlds} | {weights} | {once} |"


@pytest.mark.evidence
def test_chaos(hosts: Hosts, tmp_path: Path):
    ledger = Ledger("chaos", seed=SEED, steps=STEPS, faults=FAULTS, places=PLACES)
    (hosts.folder / "chaos").mkdir()
    undisturbed: dict[str, Any] = {}
    for number in range(RUNS):
        kind, _ = plan_of(number)
        if not ledger.begin(f"{number:02d}"):
            continue
        folder = tmp_path / f"{number}"
        folder.mkdir()
        with bed_of(kind, folder, hosts) as bed:
            if kind not in undisturbed:  # where data lie is no part of what is trained on them
                plain = recipe(bed.folder, "undisturbed", STEPS, {"type": "local"}, **bed.longer)
                undisturbed[kind] = train(plain, bed.world)
            ledger.add({f"{number:02d}": show(bed, number, undisturbed[kind])})
    pieces = [piece for _, piece in sorted(ledger.pieces.items())]
    result = {
        "what": "runs with three random faults each, beside an undisturbed run",
        "commit": commit(),
        "command": "make evidence NAME=chaos",
        "seed": SEED,
        "planned": PLANNED,
        "run": len(pieces),
        "right": sum(map(is_right, pieces)),
        "runs": pieces,
    }
    (RESULTS / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "chaos.md").write_text(table(result))
    assert [piece for piece in pieces if not is_right(piece)] == []
    if RUNS >= PLANNED:
        ledger.close()


def test_every_plan_has_its_faults():
    plans = [plan_of(number) for number in range(PLANNED)]
    for kind, faults in PLACES:
        assert {fault for place, plan in plans if place == kind for _, fault in plan} == set(faults)
    assert all(len(plan) == FAULTS and plan == sorted(plan) for _, plan in plans)
