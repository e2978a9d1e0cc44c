"""A run's record, read from its directory."""

from __future__ import annotations

import json
from typing import Any

from ..distributed import storage
from ..distributed.run_directory import RunDirectory
from .record import Line, Record, make_record, parse_lines
from .report import render_report


def read_record(run: RunDirectory, until_step: int | None = None) -> Record:
    """Everything a run wrote down so far, or up to a step."""
    environment = run.path("environment.json")
    described: dict[str, Any] = json.loads(storage.read_bytes(environment)) if storage.exists(environment) else {}
    metrics = _lines(run.path("metrics.jsonl"))
    if until_step is not None:
        metrics = [line for line in metrics if int(line.get("step", 0)) <= until_step]
    return make_record(metrics, _lines(run.path("events.jsonl")), described)


def _lines(url: str) -> list[Line]:
    return parse_lines(storage.read_bytes(url).decode()) if storage.exists(url) else []


def write_report(run: RunDirectory, state: str) -> str:
    """Write report.html beside the run's other files; returns where."""
    url = run.path("report.html")
    name = run.url.rpartition("/")[2]
    page = render_report(read_record(run), name=name, state=state, recipe_text=run.read_recipe() or "")
    storage.write_bytes(url, page.encode())
    return url
