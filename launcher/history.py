"""A run's record, read from its directory."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from ..distributed import storage
from ..distributed.run_directory import RunDirectory
from .goodput.ledger import Ledger
from .goodput.lives import read_ledger
from .record import Line, Record, make_record, parse_lines
from .report import render_report


@dataclass(frozen=True)
class History:
    """Everything a run wrote down: what it did, and where its time went."""

    record: Record
    ledger: Ledger


def read_record(run: RunDirectory, until_step: int | None = None) -> Record:
    """Everything a run wrote down so far, or up to a step."""
    metrics = _lines(run.path("metrics.jsonl"))
    if until_step is not None:
        metrics = [line for line in metrics if int(line.get("step", 0)) <= until_step]
    return make_record(metrics, _lines(run.path("events.jsonl")), _described(run))


def read_history(run: RunDirectory) -> History:
    """What a run did so far, with its ledger."""
    metrics, events = _lines(run.path("metrics.jsonl")), _lines(run.path("events.jsonl"))
    return History(make_record(metrics, events, _described(run)), read_ledger(run, metrics, events, time.time()))


def _described(run: RunDirectory) -> dict[str, Any]:
    environment = run.path("environment.json")
    described: dict[str, Any] = json.loads(storage.read_bytes(environment)) if storage.exists(environment) else {}
    return described


def _lines(url: str) -> list[Line]:
    return parse_lines(storage.read_bytes(url).decode()) if storage.exists(url) else []


def write_report(run: RunDirectory, state: str) -> str:
    """Write report.html beside the run's other files; returns where."""
    url = run.path("report.html")
    name = run.url.rpartition("/")[2]
    history = read_history(run)
    recipe_text = run.read_recipe() or ""
    page = render_report(history.record, name=name, state=state, recipe_text=recipe_text, ledger=history.ledger)
    storage.write_bytes(url, page.encode())
    return url
