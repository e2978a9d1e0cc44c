"""Runs with three random faults each end by themselves, with the weights of an undisturbed run, and all rows once.

`make evidence NAME=chaos` runs twenty of them, half on this machine and half on hosts over SSH. The quick tier has
these faults too, three to a run and not drawn: `test_failures.py`, `test_ssh_failures.py`.

CHAOS_RUNS: only the first ones. A run that is done is not done again.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from chaos import Bed, Local, compare, disturb, over_ssh, recipe
from ledger import RESULTS, Ledger, commit
from slow_steps import slow_steps
from ssh_hosts import Hosts
from training import train

STEPS = 40
FAULTS = 3
SEED = 20
RUNS = int(os.environ.get("CHAOS_RUNS", "20"))
LOCAL = ("worker SIGKILL", "worker SIGSTOP", "driver SIGKILL", "raylet SIGKILL", "head SIGKILL")
SSH = ("worker SIGKILL", "worker SIGSTOP", "raylet SIGKILL", "host cut off", "driver SIGKILL", "head SIGKILL")


def plan_of(number: int) -> tuple[str, list[tuple[int, str]]]:
    """Where run `number` is, and what happens to it behind which steps."""
    rng = random.Random(f"{SEED} {number}")
    kind, faults = (("local", LOCAL), ("ssh", SSH))[number % 2]
    steps = sorted(rng.sample(range(2, STEPS - 6), FAULTS))
    return kind, [(step, rng.choice(faults)) for step in steps]


def show(bed: Bed, number: int, undisturbed: Any) -> dict[str, Any]:
    kind, plan = plan_of(number)
    outcome = disturb(bed, f"chaos-{number}", STEPS, plan)
    if outcome.code != 0:
        return {"run": number, "place": kind, "faults": plan, "exit_code": outcome.code, "text": outcome.text[-4000:]}
    return {"run": number, "place": kind, "faults": plan, **compare(outcome, undisturbed, STEPS, bed.world)}


def is_right(piece: dict[str, Any]) -> bool:
    """Bitwise where every step ran at the first world size, to rounding otherwise."""
    if piece["exit_code"] != 0 or not piece["steps"] or not piece["rows"]:
        return False
    return piece["bitwise"] if piece["same_world"] else piece["largest_difference"] <= 1e-5


@pytest.mark.evidence
def test_chaos(hosts: Hosts, tmp_path: Path):
    ledger = Ledger("chaos", seed=SEED, steps=STEPS, faults=FAULTS)
    shared = hosts.folder / "chaos"
    shared.mkdir()
    undisturbed: dict[str, Any] = {}
    for number in range(RUNS):
        kind, _ = plan_of(number)
        if not ledger.begin(f"{number:02d}"):
            continue
        folder = tmp_path if kind == "local" else shared
        with over_ssh(hosts, shared) as ssh:
            bed = Local(folder, slow_steps(folder, 0.2, os.environ.get("PYTHONPATH", ""))) if kind == "local" else ssh
            if kind not in undisturbed:
                undisturbed[kind] = train(recipe(folder, "undisturbed", STEPS, {"type": "local"}), bed.world)
            ledger.add({f"{number:02d}": show(bed, number, undisturbed[kind])})
    pieces = [piece for _, piece in sorted(ledger.pieces.items())]
    result = {
        "what": "runs with three random faults each, beside an undisturbed run",
        "commit": commit(),
        "command": "make evidence NAME=chaos",
        "seed": SEED,
        "planned": 20,
        "run": len(pieces),
        "right": sum(map(is_right, pieces)),
        "runs": pieces,
    }
    (RESULTS / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    assert [piece for piece in pieces if not is_right(piece)] == []
    if RUNS >= 20:
        ledger.close()


def test_every_plan_has_its_faults():
    plans = [plan_of(number) for number in range(20)]
    assert {fault for kind, plan in plans if kind == "local" for _, fault in plan} == set(LOCAL)
    assert {fault for kind, plan in plans if kind == "ssh" for _, fault in plan} == set(SSH)
    assert all(len(plan) == FAULTS and plan == sorted(plan) for _, plan in plans)
